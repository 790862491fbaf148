"""What one GPU has to hold: python -m pte_trl.estimate"""
