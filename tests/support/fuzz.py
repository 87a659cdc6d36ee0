"""Runs that somebody got wrong: damaged options, files, data and code, all of them drawn from one seed."""

from __future__ import annotations

import itertools
import json
import pickle
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from commands import QUICK
from hostile import HOSTILE

STREAMS = ("train", "unlabelled", "validation", "selection", "test")

# Digits in lists of batches of a dozen, of which one is damaged, and parts of a run that do as they are told.
MINE = """
import dataclasses
import sys
import time

import torch

import metaopt

NAN, INF = float("nan"), float("inf")


def replaced(batch, key, change):
    value = batch[key].clone()
    return {**batch, key: change(value)}


def put(value, row=1):
    def change(tensor):
        tensor[row] = value
        return tensor
    return change


def without(key):
    return lambda batch: {name: value for name, value in batch.items() if name != key}


DAMAGE = {
    "nothing": lambda batch: batch,
    "nan": lambda batch: replaced(batch, "inputs", put(NAN)),
    "inf": lambda batch: replaced(batch, "inputs", put(INF)),
    "no_labels": without("labels"),
    "no_inputs": without("inputs"),
    "no_index": without("index"),
    "label_10": lambda batch: replaced(batch, "labels", put(10)),
    "label_-1": lambda batch: replaced(batch, "labels", put(-1)),
    "label_float": lambda batch: replaced(batch, "labels", lambda value: value.float()),
    "label_many": lambda batch: replaced(batch, "labels", lambda value: value[:, None].expand(-1, 3)),
    "label_few": lambda batch: replaced(batch, "labels", lambda value: value[:-1]),
    "index_1000": lambda batch: replaced(batch, "index", put(1000)),
    "index_-1": lambda batch: replaced(batch, "index", put(-1)),
    "index_float": lambda batch: replaced(batch, "index", lambda value: value.float()),
    "width_63": lambda batch: replaced(batch, "inputs", lambda value: value[:, :63]),
    "width_0": lambda batch: replaced(batch, "inputs", lambda value: value[:, :0]),
    "bytes": lambda batch: replaced(batch, "inputs", lambda value: value.byte()),
    "rows_0": lambda batch: {name: value[:0] for name, value in batch.items()},
    "none": lambda batch: None,
    "text": lambda batch: "a batch",
    "tuple": lambda batch: tuple(batch.values()),
    "lists": lambda batch: {name: value.tolist() for name, value in batch.items()},
}


def data(damage="nothing", stream="train", batch=0, whole="", **more):
    sizes = {f"num_{name}": 36 for name in ("train", "unlabelled", "validation", "selection", "test")}
    found = metaopt.digits(batch_size=12, validation_batch_size=12, **sizes)
    streams = {}
    for name in found.stream_names:
        batches = list(found.stream(name))
        names = list(batches[0])
        columns = {key: torch.cat([one[key] for one in batches]) for key in names}
        streams[name] = [{key: column[i:i + 12] for key, column in columns.items()} for i in range(0, 36, 12)]
    streams[stream][batch] = DAMAGE[damage](streams[stream][batch])
    if whole:
        streams[stream] = {
            "empty": [], "none": None, "iterator": iter(streams[stream]), "mapping": {"a": 1}, "number": 3,
            "text": "abc", "batch": streams[stream][0], "generator": (b for b in streams[stream]),
        }[whole]
    return dataclasses.replace(found, **streams, **more)


def no_facts():
    return dataclasses.replace(data(), facts={})


def score(model, batches):
    raise ValueError("my score")


def nan_score(model, batches):
    return {"accuracy": NAN}


def bad_score(model, batches):
    return {"f1": 1.0}


def with_score(which):
    return data(score=globals()[which])


def raises(*args, **kwargs):
    raise ValueError("mine\\x1b[31m [/]")


def exits(*args, **kwargs):
    sys.exit(0)


def exits_none(*args, **kwargs):
    sys.exit()


def recursive(*args, **kwargs):
    return recursive(*args, **kwargs)


def nothing(*args, **kwargs):
    return None


def asserts(*args, **kwargs):
    assert False


def stops(*args, **kwargs):
    raise StopIteration


def keyless(*args, **kwargs):
    return {}["key"]


class Loss(metaopt.InnerLoss):
    def __init__(self, how="raises"):
        self.how = how

    def __call__(self, model, batch, meta_params, upstream):
        found = globals()[self.how](model)
        return found


class Objective(metaopt.MetaObjective):
    def __init__(self, how="raises"):
        self.how, self.reads = how, ("student",)

    def __call__(self, trained, batch, meta_params):
        return globals()[self.how](trained)


class Model(torch.nn.Module):
    def __init__(self, how="raises"):
        super().__init__()
        self.how, self.linear = how, torch.nn.Linear(64, 10)

    def forward(self, inputs):
        return globals()[self.how](inputs)


class Logger(metaopt.Logger):
    how = "raises"

    def __call__(self, record):
        globals()[self.how](record)


class Stripe:
    pass


number = 3
"""

# --- one command


@dataclass(frozen=True)
class Case:
    """A command, the files beside it, and whether it must be refused."""

    name: str
    arguments: tuple[str, ...]
    files: Mapping[str, bytes] = field(default_factory=dict)
    must_fail: bool | None = True  # False: it must run; None: either
    program: str = "metaopt"


def mine(*arguments: str) -> tuple[str, ...]:
    return (*QUICK, "data=custom", *arguments)


# --- options


VALUES = (
    "null", "-1", "0", "1.5", "1e400", "-1e400", "nan", "true", "hello", "[]", "{}", "[1,[2]]", "{a: {b: 1}}",
    "1000000",
    "'???'", "'${nope}'", "'${oc.env:NOPE}'", "'${'", "''", "' '", "\"[/] \x1b[31m\"",
    "x" * 3000, "99999999999999999999",
    "0x10", "1_0", "'${trainer}'", "'${.}'", "metaopt.MLP",
)  # fmt: skip
OPTIONS = (
    "data", "data._target_", "data.noise", "data.num_train", "data.num_test", "data.batch_size", "data.seed",
    "chain", "stages", "stages.teacher", "stages.student", "stages.student.data", "stages.student.num_steps",
    "stages.student.model", "stages.student.optimizer", "stages.student.optimizer.lr", "stages.student.loss",
    "stages.student.estimator", "stages.student.carry", "stages.student.warmup_steps", "stages.student.accumulate",
    "stages.teacher.loss._target_", "stages.student.autocast", "+stages.student.initial", "+stages.student.overrides",
    "model", "model._target_", "model.hidden_sizes", "model.dropout", "optimizer", "optimizer.lr", "optimizer.momentum",
    "meta_params", "meta_params._target_", "meta_params.num_examples", "meta_params.parametrisation", "objective",
    "objective.stage", "meta_optimizer", "meta_optimizer.lr", "meta_optimizer._target_", "trainer",
    "trainer.meta_steps",
    "trainer.seed", "trainer.device", "trainer.dtype", "trainer.num_threads", "trainer.select_every",
    "trainer.patience", "trainer.validation_batches", "trainer.checkpoint_every", "trainer.keep_checkpoints",
    "trainer.start_from", "final", "final.compare", "final.num_steps", "output", "output.plots", "limits",
    "limits.batches", "limits.num_steps", "logger", "facts", "resume", "resume_force", "overwrite", "check",
    "fidelity", "fidelity.estimators", "hydra.run.dir", "transform", "schedule", "estimator", "loss",
)  # fmt: skip


def options(count: int, rng: random.Random) -> Iterator[Case]:
    """Options with values that were never meant for them; some may be taken rightly."""
    pairs = list(itertools.product(OPTIONS, VALUES))
    for option, value in rng.sample(pairs, count):
        if "meta_steps" in option and value in ("1000000",):
            continue  # a long run, as asked for
        yield Case(f"{option}={value[:40]}", (*QUICK, f"{option}={value}"), must_fail=None)


def chosen() -> Iterator[Case]:
    """Options that do not exist, or not together."""
    for text in (
        "=", "a", "a=b=c", "+", "~", "++a", "trainer", "trainer=", "trainer.=1", ".trainer=1", "x=[", "x={", "x='",
        "trainer.meta_steps=${x", "~trainer", "~data", "~chain", "~stages", "~model", "+trainer.meta_steps=3",
        "optimizer=sgdd", "model=mlpp", "data=nowhere", "experiment=none", "logger=tensorbord", "logger=print",
        "estimator=unrol", "meta_params=sources", "loss@stages.nobody.loss=weighted", "stage@stages.x=supervised",
        "meta_optimizer=sparse_adam", "meta_optimizer=custom", "data=custom", "handover=hard_labels", "model=bert2bert",
        "data=dates", "meta_params=source_weights", "meta_params=token_weights", "objective=custom", "model=gpt2",
        "model=pretrained", "handover=decoded", "trainer.validation_batches=1000000", "chain=[student,teacher]",
        "chain=[teacher]", "chain=[teacher,teacher]", "chain=[teacher,student,x]", "optimizer.lr=1e38",
        "data.num_train=1000000", "meta_params.num_examples=3", "meta_params.num_examples=5000", "optimizer.lr=-1",
        "hydra/launcher=slurm", "hydra.run.dir=", "-m", "--config-name=nope", "--config-dir=nope", "--nope", "--resume",
        "meta_params._target_=metaopt.ExampleWeight", "model.hidden_sizes=[0]", "model.dropout=1", "trainer.device=gpu",
        "trainer.device=cuda:99", "trainer.device=meta", "trainer.dtype=float16", "stages.student.loss.upstream=techer",
    ):  # fmt: skip
        fine = text in ("hydra.run.dir=", "-m")
        yield Case(text, (*QUICK, text), must_fail=None if fine else True)


# --- files


def bomb(levels: int = 9) -> bytes:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, levels)]
    return "\n".join(lines).encode()


def configs() -> Iterator[Case]:
    """Files of a user's config folder that are no configs."""
    texts = {
        "broken": b"a: [1,\nb: {",
        "tab": b"a:\n\t- b",
        "list": b"- 1\n- 2\n",
        "text": b"just a text",
        "number": b"3",
        "binary": bytes(range(256)),
        "utf-16": "lr: 1".encode("utf-16"),
        "bomb": bomb(),
        "deep": b"a: " + b"[" * 3000 + b"]" * 3000,
        "duplicate": b"lr: 1\nlr: 2\n",
        "python": b"a: !!python/object/apply:os.system ['touch planted']",
        "defaults": b"defaults:\n  - nowhere/x\n",
        "loop": b"defaults:\n  - /optimizer: mine\n",
        "no target": b"lr: 0.1\n",
        "other target": b"_target_: torch.optim.Sgd\n_partial_: true\nlr: 0.1\n",
        "interpolation": b"_target_: torch.optim.SGD\n_partial_: true\nlr: ${nowhere.lr}\n",
        "package": b"# @package nowhere.[/]\nlr: 3\n",
        "control": b'_target_: torch.optim.SGD\n_partial_: true\nlr: "\\e[31m"\n',
        "merge": b"<<: *nothing\nlr: 3\n",
        "anchor": b"&a [*a]\n",
    }
    for name, text in texts.items():
        yield Case(f"config: {name}", ("--config-dir=.", *QUICK, "optimizer=mine"), {"optimizer/mine.yaml": text})
    for name in ("broken", "binary", "list", "bomb"):
        yield Case(f"experiment: {name}", ("--config-dir=.", "experiment=mine"), {"experiment/mine.yaml": texts[name]})
    for name in ("broken", "list", "binary", "bomb", "text", "deep"):
        files = {"old/config.yaml": texts[name], "old/result.json": b"{}", "old/metrics.jsonl": b""}
        yield Case(f"resume: {name}", ("resume=old",), files)
    for name, found in {"empty": b"", "list": b"[]", "text": b"{", "binary": bytes(range(256))}.items():
        yield Case(f"result: {name}", (*QUICK, "hydra.run.dir=old"), {"old/result.json": found})


def learned() -> Iterator[Case]:
    """`meta_params.safetensors` of all kinds."""
    import torch
    from safetensors.torch import save

    good = {"logits": torch.zeros(800)}
    files = {
        "infinite": save({"logits": torch.full((800,), float("inf"))}),
        "nan": save({"logits": torch.full((800,), float("nan"))}),
        "short": save({"logits": torch.zeros(3)}),
        "other": save({"weights": torch.zeros(800)}),
        "more": save({**good, "more": torch.zeros(2)}),
        "none": save({}),
        "empty": b"",
        "cut": save(good)[:-7],
        "flipped": b"\xff" + save(good)[1:],
        "pickled": pickle.dumps({"logits": [0.0] * 800}),
        "json": json.dumps({"logits": [0.0]}).encode(),
        "integers": save({"logits": torch.zeros(800, dtype=torch.int64)}),
    }
    for name, content in files.items():
        where = {"old/meta_params.safetensors": content}
        fine = name in ("integers",)
        yield Case(f"start_from: {name}", (*QUICK, "trainer.start_from=old"), where, must_fail=not fine)
    for folder in ("nowhere", "/dev/null", "'[/]'", "''"):
        yield Case(f"start_from={folder}", (*QUICK, f"trainer.start_from={folder}"))


def folders() -> Iterator[Case]:
    """Output folders that cannot be written to."""
    for name in ("file", "file/inner", "/proc/nowhere", "/dev/null", "/dev/null/x", "x" * 300, "a/" * 3000, "'\0'"):
        yield Case(f"folder: {name[:20]}", (*QUICK, f"hydra.run.dir={name}"), {"file": b"x"})
    for name in ("'a [/] $x$'", "'é :smile:'", "'\x1b[31m'"):
        yield Case(f"folder: {name!r}", (*QUICK, f"hydra.run.dir={name}"), must_fail=False)


# --- data


def tensors(rng: random.Random) -> Iterator[Case]:
    """Batches of the user's own data that are damaged, the first or the second of a stream."""
    harmless = {"label_float", "bytes", "tuple", "lists", "text", "none", "nothing"}
    only = {
        "label": ("train", "validation", "selection", "test"),
        "no_labels": ("train", "validation", "selection", "test"),
        "index": ("train",),
        "no_index": ("train",),
    }
    kinds = ("nan", "inf", "no_labels", "no_inputs", "no_index", "label_10", "label_-1", "label_float", "label_many",
             "label_few", "index_1000", "index_-1", "index_float", "width_63", "width_0", "bytes", "rows_0", "none",
             "text", "tuple", "lists", "nothing")  # fmt: skip
    for kind, stream in itertools.product(kinds, STREAMS):
        read = only.get(kind, only.get(kind.split("_")[0], STREAMS))
        if stream not in read or (kind in harmless and rng.random() < 0.6):
            continue
        # a second batch may lie beyond what two meta-steps read
        second = rng.random() < 0.3 and stream in ("train", "selection", "test") and kind in ("nan", "inf", "rows_0")
        given = (f"+data.damage='{kind}'", f"+data.stream={stream}", f"+data.batch={int(second)}")
        more = ("limits.num_steps=3", "limits.batches=3", "final.compare=[learned]")
        name = f"data: {kind} in {stream}, batch {int(second)}"
        yield Case(
            name,
            mine("data._target_=mine.data", *given, *more),
            must_fail=kind != "nothing" and (None if kind in harmless else True),
        )
    for whole, stream in itertools.product(
        ("empty", "none", "iterator", "mapping", "number", "text", "batch", "generator"), STREAMS
    ):
        if rng.random() < 0.5 or whole == "empty":
            given = ("data._target_=mine.data", f"+data.whole={whole}", f"+data.stream={stream}")
            fine = whole == "text" or (whole, stream) == ("none", "unlabelled")
            yield Case(f"data: {stream} is {whole}", mine(*given), must_fail=None if fine else True)
    for which in ("score", "nan_score", "bad_score"):
        given = ("data._target_=mine.with_score", f"+data.which={which}", "final.compare=[learned]")
        yield Case(f"data: {which}", mine(*given), must_fail=None if which == "nan_score" else True)
    yield Case("data: no facts", mine("data._target_=mine.no_facts"))


ROWS = {"input": "a b c", "target": "x"}


def texts() -> Iterator[Case]:
    """Files of text that are damaged, and texts that nobody expects."""

    def lines(*rows: Mapping[str, Any], start: int = 0) -> bytes:
        return "".join(
            json.dumps({k: f"{v}{start + i}" for k, v in row.items()}) + "\n" for i, row in enumerate(rows)
        ).encode()

    names = ("train", "validation", "selection", "test")
    good = {f"{name}.jsonl": lines(*[ROWS] * 6, start=10 * i) for i, name in enumerate(names)}
    small = ("model.hidden_size=8", "model.num_heads=2", "model.intermediate_size=8")
    of_files = tuple(f"data.{name}={name}.jsonl" for name in names)
    run = ("data=text", "data.task=seq2seq", *of_files, "meta_params=example_weights", "stages.student.data=train",
           "debug=tiny", "trainer.check_first_step=false", "final.compare=[]", "output.plots=false",
           *small)  # fmt: skip
    damaged = {
        "empty": b"",
        "blank": b"\n\n\n",
        "cut": good["train.jsonl"][:-9],
        "no column": lines({"input": "a"}),
        "number": b'{"input": 1, "target": 2}\n',
        "list": b'{"input": ["a"], "target": "b"}\n',
        "null": b'{"input": null, "target": "b"}\n',
        "spaces": b'{"input": "  ", "target": "b"}\n',
        "binary": bytes(range(256)),
        "latin-1": '{"input": "é", "target": "ü"}\n'.encode("latin-1"),
        "array": b'[{"input": "a", "target": "b"}]',
        "surrogate": b'{"input": "\\ud800 a", "target": "b"}\n{"input": "c", "target": "d"}\n',
        "hostile": "".join(
            json.dumps({"input": f"{i} {text[:60]}", "target": text[:60] + "."}) + "\n"
            for i, text in enumerate(HOSTILE)
            if "\ud800" not in text
        ).encode(),
    }
    fine = {"array", "hostile", "number"}
    long = b'{"input": "' + b"ab " * 1700 + b'", "target": "b"}\n{"input": "c", "target": "d"}\n'
    for name, content in damaged.items():
        stream = "test" if name in ("no column", "latin-1") else "train"
        more = ("final.compare=[learned]", "data.max_length=64") if name == "hostile" else ()
        yield Case(f"text: {name}", (*run, *more), {**good, f"{stream}.jsonl": content}, must_fail=name not in fine)
    yield Case("text: as it should be", run, good, must_fail=False)
    for more in ("data.train=nowhere.jsonl", "data.train=.", "data.train=validation.jsonl", "data.input=inputs",
                 "data.tokenizer=nowhere", "data.task=causal", "data.task=classification", "data.max_length=1",
                 "data.decoder_start_token_id=-1", "data.name=nobody/nothing", "data.source=nowhere",
                 "data.train=[]", "data.train=''", "data.task=translate", "data.selection_metric=f1",
                 "model.max_length=2", "model=from_config model.kind=seq2seq model.model_type=t55",
                 "model=pretrained model.kind=seq2seq model.name=nowhere/at-all", "model=gpt2"):  # fmt: skip
        kept = run if not more.startswith("model=") else tuple(o for o in run if o not in small)
        yield Case(f"text: {more}", (*kept, *more.split(" ")), good, must_fail="max_length=1" not in more)
    classes = tuple(o for o in run if o not in small and "task" not in o)
    yield Case("text: long texts, short positions", (*run, "model.max_length=16"), {**good, "test.jsonl": long})
    yield Case("text: one class", (*classes, "data.task=classification", "model=bert_classifier"), good)


# --- code


def code(rng: random.Random) -> Iterator[Case]:
    """Targets that do not do what is asked of them."""
    hows = ("raises", "exits", "exits_none", "recursive", "nothing", "asserts", "stops", "keyless")
    parts = {
        "data": ("data=custom", "data._target_=mine.{how}"),
        "model": ("model=custom", "model._target_=mine.{how}"),
        "optimizer": ("optimizer=custom", "optimizer._target_=mine.{how}"),
        "meta_optimizer": ("meta_optimizer=custom", "meta_optimizer._target_=mine.{how}"),
        "meta_params": ("meta_params=custom", "meta_params._target_=mine.{how}"),
        "objective": ("objective=custom", "objective._target_=mine.Objective", "+objective.how={how}"),
        "loss": ("loss=custom", "loss._target_=mine.Loss", "+loss.how={how}"),
        "forward": ("model=custom", "model._target_=mine.Model", "+model.how={how}"),
        "logger": ("logger=custom", "logger._target_=mine.{how}"),
        "schedule": ("schedule=custom", "schedule._target_=mine.{how}"),
        "transform": ("transform=custom", "transform._target_=mine.{how}"),
        "estimator": ("~estimator", "+estimator._target_=mine.{how}"),
    }
    for (part, arguments), how in itertools.product(parts.items(), hows):
        if rng.random() < 0.3 or how == "exits":
            yield Case(f"code: {part} {how}", (*QUICK, *(argument.format(how=how) for argument in arguments)))
    for target in ("mine.stripe", "mine.number", "mine", "mine.", ".mine", "minee.x", "broken.x", "leaves.x",
                   "sys.exit",
                   "raising.x", "os.getcwd", "torch.nn", "metaopt.mlp", "metaopt.MLP.forward", "[/]",
                   "mine.Stripe"):  # fmt: skip
        files = {"broken.py": b"def x(:\n", "leaves.py": b"import sys; sys.exit(0)", "raising.py": b"1/0"}
        yield Case(f"code: model={target}", (*QUICK, "model=custom", f"model._target_='{target}'"), files)


def inspected() -> Iterator[Case]:
    """The other commands."""
    for more in ("check.num_directions=-1", "check.num_directions=0", "check.steps=[0.1]", "check.steps=[0,0]",
                 "check.steps=[nan,1]", "check.tolerance=nan", "check.coordinates={logit: [0]}", "check.tolerance=-1",
                 "check.coordinates={logits: [99999]}", "meta_params=uniform", "check.nope=1", "check=null",
                 "check.coordinates={logits: [-1]}"):  # fmt: skip
        yield Case(f"check: {more}", (*QUICK, *more.split(" ", 0)), program="metaopt-check")
    for more in ("fidelity.num_runs=0", "fidelity.estimators={}", "fidelity.estimators=null", "meta_params=uniform",
                 "fidelity.num_points=1.5", "+fidelity.estimators.x={_target_: metaopt.MLP}",
                 "fidelity=[]"):  # fmt: skip
        yield Case(
            f"fidelity: {more}", (*QUICK, more), program="metaopt-fidelity", must_fail=None if "={}" in more else True
        )


def cases(seed: int = 0, num_options: int = 60) -> list[Case]:
    """All of them, the same ones for the same seed."""
    rng = random.Random(seed)
    made = (options(num_options, rng), chosen(), configs(), learned(), folders(), tensors(rng), texts(), code(rng))
    found = [case for part in (*made, inspected()) for case in part]
    return [Case(c.name, c.arguments, {"mine.py": MINE.encode(), **c.files}, c.must_fail, c.program) for c in found]
