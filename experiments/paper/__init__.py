"""The paper's numbers, and finished runs set beside them: tables, figures and one page."""
