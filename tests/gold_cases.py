"""Golds alone: those that are refused, those that look like them and are not; and completions without a box."""

# Golds that mean nothing, or hold more than one answer, and golds with words that look like it and mean something.
REFUSED = [
    *(
        "{",
        "}",
        r"\frac{1}{",
        r"\text{",
        r"\text{}",
        "N/A",
        "None",
        r"\text{None}",
        "nan",
        "NaN",
        "null",
        "see solution",
    ),
    *("?", "...", "-", "=", "5+", "(3", "[1,2", r"\sqrt", r"\frac{1}", r"x^", r"2 \pm", "5 = 6", "1=2=3", r"\boxed{}"),
    *(
        r"\boxed{1} and \boxed{-2}",
        r"\boxed{1}\boxed{2}",
        r"3 \pmod 7",
        r"\ne 42",
        "5 km, 6 miles",
        "4 ft, 5 in",
        r"2\frac{3}{2}",
        "1 2",
        "$",
        "   ",
    ),
]
KEPT = [
    r"\text{no solution}",
    r"\text{undefined}",
    r"\text{none of these}",
    r"\boxed{5}",
    "0",
    r"\boxed{\boxed{5}}",
    "D",
]

# Completions without a box, for the gold 42: whether they are rewarded.
PROSE = [
    ("The answer is 42", True),
    ("The answer is 42.", True),
    ("so the answer is $42$.", True),
    ("The final answer is $42$. I hope it is correct.", True),
    ("Answer: **42**", True),
    ("#### 42", True),
    ("Therefore x = 42", True),
    ("the answer is 42 dollars", True),
    ("the answer is 42 because 40+2=42", True),
    ("The answer is not 42", False),
    ("The answer isn't 42.", False),
    ("It is wrong that the answer is 42.", False),
    (r"The answer is \neq 42", False),
    ("the answer is $41$ or $42$", False),
    ("the answer is 41 or 42", False),
    ("the answer is 42 or 41", False),
    ("the answer is 42 if x is even", False),
    ("it is 42 + x", False),
    ("the answer is 42_5", False),
    ("the answer is 42%x", False),
    ("the answer is 42, 43", False),
    ("the answer is $2+2=42$", False),
    ("I do not know", False),
    ("It is 41? No: the answer is 42", True),
    ("The final answer is **42**.", True),
    ("So she has half of 84. The answer is 42.", True),
    ("Half of 84 is 42", True),
    ("10 minus 2 times 21 - 74 = 42", True),
    ("The answer is:\n\n- 42", True),
    *(
        (f"The answer is {words} 42", False)
        for words in (
            *("less than", "at least", "more than", "at most", "up to", "over", "below", "minus", "negative", "-"),
            *("half of", "twice", "a multiple of", "the square of", "the square root of", "greater than or equal to"),
        )
    ),
    ("so it is x - 42", False),
    ("from 1 to 42", False),
    ("The answer is 42 squared", False),
]
