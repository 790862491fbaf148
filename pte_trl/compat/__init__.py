"""Every name of another library that is not its public interface, one file per library.

Public is what a library's documentation describes. All else may change in any release, so it is used here alone: the
project imports `pte_trl.compat.LIBRARY`, each name here says why it is needed, and `tests/test_compat_*.py` say what
it must do. `tests/test_compat.py` reads the imports and attributes of the project and refuses private names elsewhere.

    trl             TRL
    peft            PEFT
    transformers    transformers
    torch           PyTorch
    engines         accelerate and DeepSpeed
    hub             huggingface_hub and datasets
    grading         math-verify, its LaTeX parser, and sympy
    overrides       private methods that our classes override: a table, since they cannot be moved here

An upgrade of a library starts here: change the pin, run `tests/test_compat*.py`, mend what fails in these files.
Nothing here imports another part of the project, and a file imports no library but its own (workers that grade load
neither PyTorch nor TRL).
"""
