"""Cache distillation: an exact divergence with an exact gradient, in little memory, on the right completions."""

import json
import shutil

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

from experiments.tiny.model import build, build_tokenizer
from experiments.tiny.task import DIFFICULTIES, rows
from pte_trl import PteConfig
from pte_trl.cache.schedule import Schedule
from pte_trl.settings.parsing import parse
from pte_trl.training.arguments import RecipeArguments
from pte_trl.training.distill import PteDistillationTrainer, PteDistillConfig
from pte_trl.training.distill import script as distill_pte
from pte_trl.training.distill.completions import read_completions, write_completions
from pte_trl.training.distill.divergence import divergence
from pte_trl.training.distill.policies import evictions_seen, hidden_states, tokens_since_eviction
from tests.grids import grid
from tests.models import ALL_SEVEN, TEMPERATURE, decode_logps, left_padded_batch, log_probs, tiny, with_lora, with_pte
from tests.test_trainer import PROBLEMS, logged, model_of, trainer_for

WINDOW = 6  # E = 2
BETAS = [0.0, 0.3, 1.0]


def plain(student, teacher, head, beta, temperature):
    """The definition, whole, by torch's own kl_div (target first in the formula, second in the call)."""
    kl = torch.nn.functional.kl_div
    s, t = ((head(x) / temperature).log_softmax(-1) for x in (student, teacher))
    if beta in (0.0, 1.0):
        p, q = (t, s) if beta == 0 else (s, t)
        return kl(q, p, reduction="none", log_target=True).sum(-1)
    m = ((1 - beta) * s.exp() + beta * t.exp()).log()
    parts = [kl(m, x, reduction="none", log_target=True).sum(-1) for x in (t, s)]
    return beta * parts[0] + (1 - beta) * parts[1]


def states(tokens=23, hidden=7, vocabulary=50, dtype=torch.float64):
    head = torch.nn.Linear(hidden, vocabulary, bias=False, dtype=dtype).requires_grad_(False)
    student = torch.randn(tokens, hidden, dtype=dtype, requires_grad=True)
    return student, student.detach() + 0.5 * torch.randn(tokens, hidden, dtype=dtype), head


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("logits", [50, 350, 10**6], ids=["a token", "seven", "all at once"])
def test_the_parts_make_the_whole(beta, logits):
    student, teacher, head = states()
    weights = torch.randn(len(student), dtype=torch.float64)
    expected = plain(student, teacher, head, beta, 0.7)
    (gradient,) = torch.autograd.grad((expected * weights).sum(), student)
    found = divergence(student, teacher, head, beta, 0.7, logits)
    (again,) = torch.autograd.grad((found.loss * weights).sum(), student)
    assert (found.loss - expected).abs().max() < 1e-12
    assert (again - gradient).norm() < 1e-12 * gradient.norm()
    assert (found.kl - plain(student, teacher, head, 0.0, 0.7)).abs().max() < 1e-12
    s, t = ((head(x) / 0.7).softmax(-1) for x in (student, teacher))
    assert (found.entropy + (s * s.log()).sum(-1)).abs().max() < 1e-12
    assert torch.equal(found.agrees.bool(), s.argmax(-1) == t.argmax(-1)) and 0 < found.agrees.mean() < 1


@pytest.mark.parametrize("beta", BETAS)
def test_it_is_what_trl_calls_by_that_name(beta):
    student, teacher, head = states(dtype=torch.float32)
    theirs, entropy = ChunkedDivergenceFunction.apply(
        student, head.weight, None, teacher, head.weight, None, beta, 0.7, 1.0, None, 1.0, None
    )
    (gradient,) = torch.autograd.grad(theirs.sum(), student)
    found = divergence(student, teacher, head, beta, 0.7, 350)
    (again,) = torch.autograd.grad(found.loss.sum(), student)
    assert found.loss.detach() == pytest.approx(theirs.detach(), abs=1e-5)
    assert found.entropy == pytest.approx(entropy, abs=1e-5)
    assert again == pytest.approx(gradient, abs=1e-5)


def test_autograd_keeps_no_logits():
    student, teacher, head = states(tokens=400, vocabulary=2000, dtype=torch.float32)
    kept = []

    def keep(x):
        kept.append(x.numel())
        return x.detach()

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        found = divergence(student, teacher, head, 0.0, 1.0, logits=20_000)
    assert max(kept) <= max(student.numel(), head.weight.numel()) < 400 * 2000 / 50
    found.loss.sum().backward()
    assert student.grad.norm() > 0


# ---- student and teacher --------------------------------------------------------------------------------------------


def loss_of(model, beta=0.0, completion=14):
    ids, mask, prompt = left_padded_batch([6, 3], completion)
    weights = torch.randn(2, completion, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    student, teacher = hidden_states(model, ids, mask, prompt, Schedule(WINDOW))
    found = divergence(
        student.flatten(0, 1), teacher.flatten(0, 1), model.get_output_embeddings(), beta, TEMPERATURE, 300
    )
    return (found.loss * weights.flatten()).sum()


def gradients(model, loss) -> dict:
    model.zero_grad()
    loss(model).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


STUDENTS = {
    "pte": lambda **kwargs: with_pte(tiny(**kwargs)),
    "pte-seven-sum": lambda **kwargs: with_pte(tiny(**kwargs), target_modules=ALL_SEVEN, state_update="sum"),
    "lora_c": lambda **kwargs: with_lora(tiny(**kwargs)),
}


@pytest.mark.parametrize("make", STUDENTS.values(), ids=STUDENTS)
def test_the_same_from_a_decode_against_the_bare_model(make):
    """Log-probs of a real bounded decode, and of the base before it ever had an adapter."""
    base = tiny()
    ids, mask, prompt = left_padded_batch([6, 3], 14)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = base(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    teacher = log_probs(logits[:, prompt - 1 : -1])
    torch.manual_seed(0)
    model = make()
    model.get_base_model().load_state_dict(base.state_dict(), strict=False)
    weights = torch.randn(2, 14, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def decoded(model):
        student = decode_logps(model, ids, mask, prompt, WINDOW)
        return ((teacher.exp() * (teacher - student)).sum(-1) * weights).sum()

    expected, found = gradients(model, decoded), gradients(model, loss_of)
    for name, gradient in expected.items():
        assert gradient.norm() > 1e-6, name
        assert (found[name] - gradient).norm() <= 1e-8 * gradient.norm(), name


@pytest.mark.thorough  # the gradients above, against autograd through the decode, are the same
@grid(student=STUDENTS, beta=BETAS)
def test_central_differences(student, beta):
    make = STUDENTS[student]
    model = make(wide_norms=True)
    expected = gradients(model, lambda model: loss_of(model, beta))
    generator, step = torch.Generator().manual_seed(5), 1e-5
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        direction = torch.randn(parameter.shape, dtype=parameter.dtype, generator=generator)
        losses = []
        with torch.no_grad():
            for sign in (1, -2):
                parameter.add_(direction, alpha=sign * step)
                losses.append(loss_of(model, beta).item())
            parameter.add_(direction, alpha=step)
        measured, computed = (losses[0] - losses[1]) / (2 * step), (expected[name] * direction).sum().item()
        assert expected[name].norm() > 1e-7, name
        assert abs(measured - computed) <= 1e-4 * max(abs(computed), expected[name].norm().item()), name


def test_when_tokens_are_predicted():
    schedules = [Schedule(4), Schedule(8)]
    seen = evictions_seen(12, schedules)
    for row, schedule in enumerate(schedules):
        since = tokens_since_eviction(12, schedule)
        for token in range(1, 12):  # token t is predicted when thought t - 1 is fed
            k = schedule.evictions_before(token - 1)
            assert seen[row, token] == k
            assert since[token] == (token - 1 - schedule.decoded_under(k).start if k else -1)
    assert seen[:, 0].tolist() == [0, 0]


# ---- training -------------------------------------------------------------------------------------------------------


def distiller(tmp_path, method="pte", dataset=None, **changes):
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    settings = {
        "output_dir": str(tmp_path),
        "method": method,
        "window": 8,
        "per_device_train_batch_size": 8,
        "max_completion_length": 32,
        "max_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "disable_tqdm": True,
    } | changes
    script = RecipeArguments("unused", rank=8, num_global_tokens=8)
    prompts = Dataset.from_dict({"prompt": [[{"role": "user", "content": p}] for p in PROBLEMS]})
    return PteDistillationTrainer(
        model=model_of(len(tokenizer)),
        args=PteDistillConfig(**settings),
        train_dataset=dataset or prompts,
        processing_class=tokenizer,
        peft_config=script.adapter_config(method),
    )


@pytest.mark.parametrize("method", ["pte", pytest.param("lora_c", marks=pytest.mark.thorough)])
def test_it_learns_and_grpo_starts_from_it(tmp_path, method):
    trainer = distiller(tmp_path, method, max_steps=12)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    kl = logged(trainer, "kl_after_eviction")
    assert sum(kl[-3:]) < 0.8 * sum(kl[:3])
    for name, p in trainer.model.named_parameters():
        assert torch.equal(p, before[name]) != p.requires_grad, name
    trainer.save_model(str(tmp_path / "adapter"))
    model = PeftModel.from_pretrained(model_of(len(build_tokenizer())), str(tmp_path / "adapter"), is_trainable=True)
    loaded = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert loaded and all(torch.equal(p, trainer.model.get_parameter(n)) for n, p in loaded.items())
    grpo = trainer_for(tmp_path, method, model=model, peft=False, max_steps=1)
    grpo.train()
    assert max(logged(grpo, "mismatch/max")) < 1e-4


def test_what_is_logged(tmp_path):
    """Every number again from the completions and the logits of both policies, token by token."""
    trainer, window, evict = distiller(tmp_path), 8, 2
    expected = {name: [] for name in ("kl", "top1_agreement", "entropy", "rollout/evictions")}
    expected |= {f"{name}_after_eviction": [] for name in ("kl", "top1_agreement")}
    loss = trainer._compute_loss

    @torch.no_grad()
    def measure(model, inputs, count):
        ids, mask = (torch.cat([inputs[f"prompt_{x}"], inputs[f"completion_{x}"]], dim=1) for x in ("ids", "mask"))
        real = inputs["completion_mask"].bool()
        states = hidden_states(model, ids, mask, inputs["prompt_ids"].shape[1], Schedule(window))
        s, t = (model.get_output_embeddings()(x).log_softmax(-1) for x in states)
        late = real & (torch.arange(real.shape[1]) > window)  # of token t, t tokens have been fed before
        kl, agrees = (t.exp() * (t - s)).sum(-1), (s.argmax(-1) == t.argmax(-1)).float()
        for name, values in (("kl", kl), ("top1_agreement", agrees)):
            expected[name].append(values[real].mean().item())
            expected[f"{name}_after_eviction"].append(values[late].mean().item())
        expected["entropy"].append(-(s.exp() * s).sum(-1)[real].mean().item())
        lengths = inputs["completion_mask"].sum(1).tolist()
        evictions = [max(0, -(-(length - 1 - window) // evict)) for length in lengths]
        expected["rollout/evictions"].append(sum(evictions) / len(evictions))

    def watched(model, inputs, count):
        measure(model, inputs, count)
        return loss(model, inputs, count)

    trainer._compute_loss = watched
    trainer.train()
    for name, values in expected.items():
        assert len(values) == 2 and logged(trainer, name) == pytest.approx(values, rel=1e-3), name
    assert logged(trainer, "loss") == pytest.approx(logged(trainer, "kl"), rel=1e-2)
    # an untrained adapter is the base, so that nothing can differ before an eviction
    assert 0 < logged(trainer, "kl")[0] < logged(trainer, "kl_after_eviction")[0]
    assert logged(trainer, "rollout/evictions")[0] > 2
    assert 0.1 < logged(trainer, "pte/update_over_state")[0] < 1


def test_only_tokens_after_an_eviction(tmp_path):
    trainer = distiller(tmp_path, distilled_tokens="after_eviction")
    trainer.train()
    assert logged(trainer, "loss") == pytest.approx(logged(trainer, "kl_after_eviction"), rel=1e-2)


@pytest.mark.parametrize(
    "adapter",
    [PteConfig(rank=4, num_global_tokens=4, modules_to_save=["lm_head"]), LoraConfig(target_modules="lm_head")],
)
def test_the_teacher_has_the_base_models_head(adapter):
    """Whatever is put around it; and no gradient reaches a trained head through the teacher."""
    model = get_peft_model(tiny(tie_word_embeddings=False), adapter)
    head = model.get_output_embeddings()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lm_head" in name and p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    x = torch.randn(9, model.config.hidden_size, dtype=torch.float64)
    student, teacher = x.clone().requires_grad_(), x.clone().requires_grad_()
    with torch.no_grad(), model.disable_adapter():
        t = model.get_output_embeddings()(x).log_softmax(-1)
    with torch.no_grad():
        s = head(x).log_softmax(-1)
    assert (s - t).abs().max() > 0.01
    found = divergence(student, teacher, head)
    assert (found.kl - (t.exp() * (t - s)).sum(-1)).abs().max() < 1e-12
    found.loss.sum().backward()
    assert teacher.grad is None and student.grad.norm() > 0


def test_accumulation_takes_the_same_step(tmp_path):
    moved = []
    for batching in ({}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}):
        options = {
            "optim": "sgd",
            "max_grad_norm": 0.0,
            "learning_rate": 1.0,
            "max_steps": 1,
            "shuffle_dataset": False,
        }
        trainer = distiller(tmp_path, distilled_tokens="after_eviction", **options, **batching)
        before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
        trainer.train()
        moved.append({n: trainer.model.get_parameter(n).detach() - p for n, p in before.items()})
    for name, step in moved[0].items():
        assert (moved[1][name] - step).norm() <= 1e-3 * step.norm() + 1e-7, name
    assert any(step.norm() > 0 for step in moved[0].values())


def test_who_writes(tmp_path, monkeypatch):
    """The teacher: base, no eviction. The student: its adapter on, its own window."""
    asked = []
    import pte_trl.training.generation as module

    original = module.rollout

    def watch(model, prompt_ids, policy, **kwargs):
        asked.append((policy.window, next(m for m in model.modules() if hasattr(m, "pte_down")).disable_adapters))
        return original(model, prompt_ids, policy, **kwargs)

    monkeypatch.setattr(module, "rollout", watch)
    for on_policy in (False, True):
        distiller(tmp_path, on_policy=on_policy, max_steps=1).train()
    assert asked == [(None, True), (8, False)]


def test_completions_that_were_sampled_once(tmp_path):
    tokenizer = build_tokenizer()
    first = distiller(tmp_path)
    path = tmp_path / "completions.jsonl"
    write_completions(path, first.model.unload(), tokenizer, first.train_dataset, first.args, batch=5)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == len(PROBLEMS)
    data = read_completions(str(path), tokenizer)
    second = distiller(tmp_path, dataset=data, shuffle_dataset=False, max_steps=1)
    second.train()
    lengths = [len(row["completion_ids"]) for row in rows[:8]]
    assert logged(second, "completions/mean_length")[0] == pytest.approx(sum(lengths) / 8, rel=1e-3)


GOOD = {"prompt": [{"role": "user", "content": "1+1?"}], "completion_ids": [5, 6]}
# Rows of a file of completions -> what the message says of the last one.
ODD_ROWS = {
    "completion_ids are of another tokenizer": [GOOD | {"completion_ids": [999999]}],
    "needs prompt .* has prompt: list": [GOOD | {"prompt": []}],
    "needs prompt .* has prompt: int": [GOOD | {"prompt": 7}],
    r"prompt=\[1, 2\]: must be a text, or messages with role and content": [GOOD | {"prompt": [1, 2]}],
    r"prompt=\[{'role': 'user'}\]: must be a text, or messages": [GOOD | {"prompt": [{"role": "user"}]}],
    "content': None}.*: must be a text, or messages": [GOOD | {"prompt": [{"role": "user", "content": None}]}],
    r"prompt='\\ud800': is not text": [GOOD | {"prompt": "\ud800"}],
    "prompt is a str, and the first is a list": [GOOD, GOOD | {"prompt": "1+1?"}],
}


@pytest.mark.parametrize("message", ODD_ROWS)
def test_an_odd_row_is_found_when_its_file_is_read(tmp_path, message):
    path = tmp_path / "completions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ODD_ROWS[message]))
    with pytest.raises(ValueError, match=rf"completions\.jsonl, line {len(ODD_ROWS[message])}: .*{message}"):
        read_completions(str(path), build_tokenizer())


def test_messages_that_are_not_alike_and_long_prompts(tmp_path, capsys):
    path, tokenizer = tmp_path / "completions.jsonl", build_tokenizer()
    long = GOOD | {"prompt": [{"role": "user", "content": "1 + " * 50}]}
    path.write_text("".join(json.dumps(row) + "\n" for row in (GOOD, long, GOOD)))
    assert len(read_completions(str(path), tokenizer, 40)) == 2
    assert "1 of 3 prompts have more than max_prompt_tokens=40 tokens and are dropped" in capsys.readouterr().out
    path.write_text(json.dumps(GOOD) + "\n")
    tokenizer.chat_template = "{{ raise_exception('no such role') }}"
    with pytest.raises(ValueError, match=r"line 1: prompt=.*: cannot be made tokens \(TemplateError: no such role"):
        read_completions(str(path), tokenizer)
    unlike = [GOOD | {"prompt": [GOOD["prompt"][0] | {"name": name}]} for name in ("a", 1)]
    path.write_text("".join(json.dumps(row) + "\n" for row in unlike))
    with pytest.raises(ValueError, match="the messages of its prompts are not alike"):
        read_completions(str(path), tokenizer)


def test_a_distillation_that_ended_early_goes_on(tmp_path, capsys):
    """From its newest complete checkpoint, to the same weights by the same draws; the half-written one is skipped."""
    model, tokenizer = build(0)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "base")
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows("train", 16, 2, DIFFICULTIES["easy"]))))
    flags = {"model_name_or_path": tmp_path / "base", "dataset_name": tmp_path / "train.jsonl"}
    flags |= {"window": (4, 16), "evict_ratio": (0.1, 0.9)}
    flags |= {"per_device_train_batch_size": 4, "max_completion_length": 24, "lr_scheduler_type": "constant"}
    flags |= {"save_strategy": "steps", "save_steps": 2, "rank": 8, "num_global_tokens": 8, "disable_tqdm": "true"}

    def launch(output: str, steps: int):
        settings = flags | {"output_dir": tmp_path / output, "max_steps": steps}
        words = {key: value if isinstance(value, tuple) else (value,) for key, value in settings.items()}
        argv = [str(word) for key, values in words.items() for word in (f"--{key}", *values)]
        return distill_pte.main(["--config", "recipes/distill_tiny.yaml", *argv])

    launch("whole", 4)
    launch("ended", 2)
    (tmp_path / "ended/manifest.json").unlink()
    shutil.copytree(tmp_path / "whole/checkpoint-4", tmp_path / "ended/checkpoint-4")
    next((tmp_path / "ended/checkpoint-4").glob("*.safetensors")).unlink()
    capsys.readouterr()
    launch("ended", 4)
    said = capsys.readouterr().out
    assert "checkpoint-4 is skipped: " in said and "resumes from" in said and "checkpoint-2" in said
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "ended"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert launch("ended", 4) is None and "finished" in capsys.readouterr().out


BAD = [
    ({"resume_from_checkpoint": "auto"}, "resume_from_checkpoint='auto': not used; resume is"),
    ({"method": "lora"}, "method='lora': must be one of pte, lora_c"),
    ({"beta": 1.5}, r"beta=1\.5: must be a number from 0 to 1"),
    ({"distilled_tokens": "late"}, "distilled_tokens='late'.*after_eviction"),
    ({"window": "0"}, "window=0"),
    ({"budget": 64, "window": 8}, "exactly one"),
    ({"teacher_model_name_or_path": "big"}, "teacher_model_name_or_path='big'.*adapter off"),
    ({"top_p": 0.9}, r"top_p=0\.9"),
    ({"use_vllm": "true"}, "use_vllm"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[str(changes) for changes, _ in BAD])
def test_a_bad_recipe_is_refused(changes, message):
    argv = ["--config", "recipes/distill_tiny.yaml", *(str(x) for key in changes for x in (f"--{key}", changes[key]))]
    with pytest.raises(ValueError, match=message):
        parse((RecipeArguments, PteDistillConfig), argv)
