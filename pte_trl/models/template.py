"""Chat templates: how a problem and its instruction become a prompt, refused where one of them would not arrive.

prompt = make_prompt(problem, system_prompt, role, chat=tokenizer.chat_template is not None)
check_template(tokenizer, system_prompt, role=role)       # as often as one likes: nothing is changed
"""

import inspect
import json

from accelerate import PartialState
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from pte_trl.compat.transformers import template_variables

ROLES = ("system", "user")
PROBLEM = "What is $\\frac{1}{2}+7$?\nShow your work."


def say(sentence: str) -> None:
    """On the main process."""
    PartialState().print(sentence, flush=True)


def make_prompt(
    problem: str, system_prompt: str | None, role: str = "system", *, chat: bool
) -> str | list[dict[str, str]]:
    """The prompt of one problem, for training, evaluation and `recipes/generate.py` alike.

    Args:
        role: of the message that holds `system_prompt`: "system" for a message before the problem's, "user" for the
            last line of the problem's own message, as the authors of DeepSeek-R1 advise for its distillates.
        chat: whether there is a chat template; without one the prompt is plain text.
    """
    if system_prompt and role == "user":
        problem, system_prompt = f"{problem}\n{system_prompt}", None
    if not chat:
        return f"{system_prompt}\n{problem}" if system_prompt else problem
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    return [*system, {"role": "user", "content": problem}]


def check_template(
    tokenizer: PreTrainedTokenizerBase,
    system_prompt: str | None = None,
    chat_template_kwargs: dict | None = None,
    verbose: bool = False,
    role: str = "system",
) -> None:
    """Renders a prompt as training and evaluation will.

    Args:
        verbose: print what has no effect.
        role: of `make_prompt`.

    Raises:
        ValueError: arguments of the wrong kind, a template that fails, one that drops the problem or the system
            prompt, or a prompt that begins with the BOS token twice.
    """
    options = check_options(tokenizer, chat_template_kwargs)
    if tokenizer.chat_template is None:
        if verbose and options:
            say(f"chat_template_kwargs={options!r}: there is no chat template that could read it")
        return
    messages = make_prompt(PROBLEM, None, chat=True)
    try:
        text = render(tokenizer, messages, options)
    except Exception as error:  # a template is a program: it may raise anything
        raise ValueError(f"the chat template cannot be rendered for one problem ({described(error)})") from error
    if PROBLEM not in text:
        raise ValueError(f"the chat template drops the problem: {PROBLEM!r} is rendered as {text[-200:]!r}")
    if system_prompt:
        messages = make_prompt(PROBLEM, system_prompt, role, chat=True)
        check_system_prompt(tokenizer, system_prompt, messages, options)
    check_beginning(tokenizer, messages, options, verbose)
    if verbose:
        idle = sorted(set(options) - template_variables(tokenizer.get_chat_template()))
        if idle:
            say(f"chat_template_kwargs: the chat template does not look at {', '.join(idle)}")


def check_system_prompt(
    tokenizer: PreTrainedTokenizerBase, system_prompt: str, messages: list[dict], options: dict
) -> None:
    """Problem and system prompt both arrive, whichever message holds them."""
    remedy = "system_prompt_role: user puts it behind each problem"
    try:
        text = render(tokenizer, messages, options)
    except Exception as error:
        raise ValueError(
            f"system_prompt={system_prompt[:60]!r}: the chat template takes no system message "
            f"({described(error)}); {remedy}"
        ) from error
    if system_prompt.strip() not in text:
        raise ValueError(f"system_prompt={system_prompt[:60]!r}: the chat template drops it; {remedy}")
    if PROBLEM not in text:
        raise ValueError("the chat template drops the problem that follows a system message")


def begin_answers(tokenizer: PreTrainedTokenizerBase, prefix: str | None, options: dict | None = None) -> None:
    """Makes every prompt end in `prefix`, so that the model's answer continues it.

    A chat template that ends its prompts so already is left alone: DeepSeek-R1's adds "<think>\\n" in its newer
    versions and not in its first.

    Raises:
        ValueError: there is no chat template.
    """
    if not prefix:
        return
    if tokenizer.chat_template is None:
        raise ValueError(f"generation_prefix={prefix!r}: the tokenizer has no chat template that it could be added to")
    if render(tokenizer, make_prompt(PROBLEM, None, chat=True), options or {}).endswith(prefix):
        return
    # A line break at the very end of a template is not rendered; it must not come to stand before the prefix.
    template = tokenizer.get_chat_template().removesuffix("\n")
    literal = json.dumps(prefix, ensure_ascii=False)
    tokenizer.chat_template = f"{template}{{% if add_generation_prompt %}}{{{{ {literal} }}}}{{% endif %}}"


def check_options(tokenizer: PreTrainedTokenizerBase, options: dict | None) -> dict:
    """chat_template_kwargs as a dictionary of what only the template reads."""
    if options is None:
        return {}
    if not isinstance(options, dict) or not all(isinstance(name, str) for name in options):
        raise ValueError(
            f"chat_template_kwargs={options!r}: is a {type(options).__name__}; allowed is a mapping of names to "
            "values, such as {enable_thinking: false}"
        )
    taken = [name for name in options if name in inspect.signature(tokenizer.apply_chat_template).parameters]
    taken += [name for name in ("messages", "kwargs") if name in options]
    if taken:
        raise ValueError(f"chat_template_kwargs={options!r}: {', '.join(taken)} is set by the trainer itself")
    return options


def render(tokenizer: PreTrainedTokenizerBase, messages: list[dict], options: dict) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)


def described(error: Exception) -> str:
    """What a template said by itself, else the error with its kind."""
    text = " ".join(str(error).split())[:200]
    return text if isinstance(error, TemplateError) else f"{type(error).__name__}: {text}"


def check_beginning(tokenizer: PreTrainedTokenizerBase, messages: list[dict], options: dict, verbose: bool) -> None:
    """One token that begins the text: not two, and if the model knows one, one."""
    bos = tokenizer.bos_token_id
    if bos is None:
        return
    ids = tokenizer.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=True, **options
    )
    ids = ids["input_ids"]
    if ids[:2] == [bos, bos]:
        raise ValueError(f"the chat template begins a prompt with {tokenizer.bos_token!r} twice")
    if verbose and bos not in ids and tokenizer("1")["input_ids"][:1] == [bos]:
        say(f"the chat template begins no prompt with {tokenizer.bos_token!r}, as the tokenizer does with plain text")
