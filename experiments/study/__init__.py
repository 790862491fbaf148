"""Does it learn? Small studies with seeds and controls; every run can be made alone, results are JSON files."""
