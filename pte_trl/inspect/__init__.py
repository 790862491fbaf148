"""What the state S keeps: python -m pte_trl.inspect"""
