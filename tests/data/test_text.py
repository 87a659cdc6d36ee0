"""Text of the user's own: reading, tokens, batches of each task, scores, and every message about bad input."""

from __future__ import annotations

import csv
import json
import logging
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import command
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from metaopt.base.errors import ConfigError
from metaopt.data.bundle import DataBundle
from metaopt.data.text import text
from metaopt.data.text_tasks import greedy_continue
from metaopt.data.text_tokens import character_tokenizer
from metaopt.losses.logits import IGNORED, label_losses, mean_over_positions
from metaopt.models.hugging_face import from_config

pytest.importorskip("datasets")
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")

LABELLED = ("train", "validation", "selection", "test")
WORDS = ["bdfg", "befg", "ad", "cdf", "bdf", "cd", "ae", "bef", "ce", "adfg", "adf", "cefg", "cef", "cdfg"]
WORDS += ["aefg", "bd", "be", "aef"]
PARTS = {"train": slice(0, 8), "validation": slice(8, 11), "selection": slice(11, 14), "test": slice(14, 18)}


def rows(part: Sequence[str]) -> list[dict[str, Any]]:
    """A word, the word backwards, its first letter, and who wrote it."""
    found = enumerate(part)
    return [
        {"word": w, "answer": w[::-1], "letter": w[0], "number": len(w), "author": ["zoe", "bob"][i % 2]}
        for i, w in found
    ]


def write(path: Path, content: Sequence[dict[str, Any]]) -> str:
    """Write rows in the format that the file's name says; return the path."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in content))
    elif path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(content)), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, content[0], delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(content)
    return str(path)


class Folder:
    """The user's folder: a file per stream; `load` reads it with options."""

    def __init__(self, path: Path, ending: str = "jsonl") -> None:
        self.path = path
        self.files = {s: write(path / f"{s}.{ending}", rows(WORDS[p])) for s, p in PARTS.items()}

    def load(self, task: Any = "seq2seq", **options: Any) -> DataBundle:
        target = {"seq2seq": "answer", "causal": "answer", "classification": "letter"}.get(task)
        given = {"input": "word", "target": target, "cache_dir": str(self.path / "cache"), "batch_size": 4}
        return text(task, **{**self.files, **given, **options})

    def refused(self, **options: Any) -> str:
        with pytest.raises(ConfigError) as caught:
            self.load(**options)
        return str(caught.value)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def batches(stream: Iterable[Any] | None) -> list[dict[str, Tensor]]:
    assert stream is not None
    return list(stream)


def read(bundle: DataBundle, tokens: Tensor) -> list[str]:
    filler = tokens.masked_fill(tokens == IGNORED, bundle.facts["pad_token_id"])
    return [t.strip() for t in bundle.tokenizer.batch_decode(filler, skip_special_tokens=True)]


# --- reading ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["csv", "tsv", "parquet"])
def test_every_format_gives_the_same_batches(ending: str, tmp_path: Path) -> None:
    for name in ("json", "other"):
        (tmp_path / name).mkdir()
    one = Folder(tmp_path / "json").load(source="author")
    other = Folder(tmp_path / "other", ending).load(source="author")
    assert one.facts == other.facts
    assert one.source_names == other.source_names == ("bob", "zoe")
    for name in LABELLED:
        torch.manual_seed(3)
        first = batches(one.stream(name))
        torch.manual_seed(3)
        for a, b in zip(first, batches(other.stream(name)), strict=True):
            assert a.keys() == b.keys()
            assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_csv_is_read_as_it_is_written(folder: Folder) -> None:
    train = [{"word": "007", "answer": "NA"}, {"word": "1.50", "answer": 'a "b", c'}]
    bundle = folder.load(train=write(folder.path / "own.csv", train), batch_size=2)
    torch.manual_seed(0)
    (batch,) = batches(bundle.train)
    found = dict(zip(read(bundle, batch["input_ids"]), read(bundle, batch["labels"]), strict=True))
    assert found == {"007": "NA", "1.50": 'a "b", c'}


def test_several_files_are_one_stream(folder: Folder) -> None:
    more = write(folder.path / "more.jsonl", rows(["cab", "bad"]))
    assert folder.load(train=[folder.files["train"], more]).sizes["train"] == 10


def test_sources_are_numbered_and_keep_their_names(folder: Folder) -> None:
    bundle = folder.load(source="author")
    assert bundle.facts["num_sources"] == 2
    for batch in batches(bundle.train):
        written = [WORDS[i] for i in batch["index"].tolist()]
        assert read(bundle, batch["input_ids"]) == written
        named = [bundle.source_names[i] for i in batch["source"].tolist()]
        assert named == [["zoe", "bob"][i % 2] for i in batch["index"].tolist()]
    assert "source" not in batches(bundle.validation)[0]
    assert "index" not in batches(bundle.validation)[0]


def test_training_is_shuffled_by_the_global_generator_and_tests_are_not(folder: Folder) -> None:
    bundle = folder.load()

    def order(seed: int) -> list[int]:
        torch.manual_seed(seed)
        return torch.cat([batch["index"] for batch in batches(bundle.train)]).tolist()

    assert order(1) == order(1)
    assert order(1) != order(2)
    assert sorted(order(1)) == list(range(8))
    assert read(bundle, batches(bundle.test)[0]["input_ids"]) == WORDS[PARTS["test"]]


# --- the batches of each task -----------------------------------------------------------------------------------


def test_answers_are_shifted_behind_the_decoders_first_token(folder: Folder) -> None:
    bundle = folder.load()
    pad, bos, eos = (bundle.facts[f"{name}_token_id"] for name in ("pad", "bos", "eos"))
    for batch in batches(bundle.train):
        labels, given, counts = batch["labels"], batch["decoder_input_ids"], batch["labels"] != IGNORED
        assert (given[:, 0] == bos).all()
        assert torch.equal(given[:, 1:][counts[:, 1:]], labels[:, :-1][counts[:, 1:]])
        assert read(bundle, labels) == [WORDS[i][::-1] for i in batch["index"].tolist()]
        assert ((labels == eos).sum(1) == 1).all()
        assert torch.equal(batch["attention_mask"], (batch["input_ids"] != pad).long())
        assert batch["attention_mask"].sum(1).max() == batch["input_ids"].shape[1]
    assert bundle.facts["max_length"] == 4
    assert bundle.facts["max_target_length"] == 5
    assert bundle.facts["vocab_size"] == len(bundle.tokenizer) == 4 + len("abcdefg")


def test_the_first_token_of_a_decoder_can_be_given(folder: Folder) -> None:
    bundle = folder.load(decoder_start_token_id=2)
    assert bundle.facts["bos_token_id"] == 2
    assert (batches(bundle.test)[0]["decoder_input_ids"][:, 0] == 2).all()


def test_causal_labels_are_the_tokens_of_the_answer(folder: Folder) -> None:
    bundle = folder.load("causal", separator="=")
    for batch in batches(bundle.train):
        tokens, labels = batch["input_ids"], batch["labels"]
        counts = labels != IGNORED
        assert torch.equal(labels[counts], tokens[counts])
        assert read(bundle, labels) == [WORDS[i][::-1] for i in batch["index"].tolist()]
        assert read(bundle, tokens) == [f"{WORDS[i]}={WORDS[i][::-1]}" for i in batch["index"].tolist()]
        assert counts.sum(1).tolist() == [len(WORDS[i]) + 1 for i in batch["index"].tolist()]  # and the end token
        assert (tokens[:, 0] == bundle.facts["bos_token_id"]).all()
        assert not (counts & (batch["attention_mask"] == 0)).any()
    assert bundle.facts["max_length"] == max(b["input_ids"].shape[1] for b in batches(bundle.train))


def test_a_causal_text_without_target_is_its_own(folder: Folder) -> None:
    bundle = folder.load("causal", target=None)
    (batch,) = batches(bundle.test)
    assert read(bundle, batch["input_ids"]) == read(bundle, batch["labels"]) == WORDS[PARTS["test"]]
    assert torch.equal(batch["labels"][:, 1:] != IGNORED, batch["attention_mask"][:, 1:].bool())
    assert (batch["labels"][:, 0] == IGNORED).all()  # the begin token is given
    assert bundle.selection_metric == "token_accuracy"


def test_classes_are_numbered_in_order(folder: Folder) -> None:
    bundle = folder.load("classification")
    assert bundle.facts["num_labels"] == 3
    for batch in batches(bundle.train):
        assert batch["labels"].tolist() == ["abc".index(WORDS[i][0]) for i in batch["index"].tolist()]
        assert "decoder_input_ids" not in batch


def test_numbered_classes_keep_their_order(folder: Folder) -> None:
    train = [{"word": f"w{n}", "letter": n} for n in (10, 9, 2)]
    others = [write(folder.path / f"{s}.jsonl", [{"word": s, "letter": 10}]) for s in LABELLED[1:]]
    bundle = folder.load(
        "classification", train=write(folder.path / "n.jsonl", train), **dict(zip(LABELLED[1:], others, strict=True))
    )
    assert {b["labels"].item() for b in batches(bundle.test)} == {2}  # by size, and not '10' < '2' < '9'


@pytest.mark.parametrize("task", ["seq2seq", "causal", "classification"])
def test_unlabelled_inputs(task: str, folder: Folder) -> None:
    bundle = folder.load(task, unlabelled=write(folder.path / "u.jsonl", [{"word": "xyz"}, {"word": "y"}]))
    (batch,) = batches(bundle.unlabelled)
    assert sorted(read(bundle, batch["input_ids"])) == ["xyz", "y"]
    assert set(batch) == {"input_ids", "attention_mask", "index"} | ({"labels"} if task == "causal" else set())
    assert folder.load(task).unlabelled is None


T5_SIZES = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
GPT2_SIZES = {"n_embd": 8, "n_layer": 1, "n_head": 2}


@pytest.mark.parametrize(("kind", "family", "sizes"), [("seq2seq", "t5", T5_SIZES), ("causal", "gpt2", GPT2_SIZES)])
def test_filler_changes_no_loss(kind: Any, family: str, sizes: dict[str, Any], folder: Folder) -> None:
    """Each example's loss in a batch is the one that it has alone, and that which the model itself gives it."""
    bundle = folder.load(kind, validation_batch_size=1)
    names = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "max_length", "max_target_length")
    model = from_config(kind, family, sizes, **{name: bundle.facts[name] for name in names}).double().eval()

    def losses(stream: Iterable[Any]) -> Tensor:
        return torch.cat([mean_over_positions(*label_losses(model, batch)).detach() for batch in stream])

    together = losses(folder.load(kind, validation_batch_size=4).test)
    alone = losses(bundle.test)
    assert len({batch["input_ids"].shape for batch in batches(bundle.test)}) > 1
    assert torch.allclose(together, alone, rtol=1e-6)  # T5's norm works in float32
    own = torch.stack([model(**batch).loss.detach().double() for batch in bundle.test])
    assert torch.allclose(alone, own, rtol=1e-6)


# --- lengths ----------------------------------------------------------------------------------------------------


def test_what_is_cut_is_said_once(folder: Folder, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        bundle = folder.load(max_length=3, max_target_length=4)
    (message,) = caplog.messages
    assert "max_length=3 tokens: 2 of 8 train inputs (longest: 4), 1 of 3 validation inputs" in message
    assert "max_target_length=4 tokens: 2 of 8 train targets (longest: 5)" in message
    assert bundle.facts["max_length"] == 3
    assert bundle.facts["max_target_length"] == 4
    for batch in batches(bundle.train):
        assert read(bundle, batch["input_ids"]) == [WORDS[i][:3] for i in batch["index"].tolist()]
        assert read(bundle, batch["labels"]) == [WORDS[i][::-1][:3] for i in batch["index"].tolist()]


def test_nothing_is_said_where_nothing_is_cut(folder: Folder, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        folder.load(max_length=4, max_target_length=5)
    assert caplog.messages == []


# --- tokenizers -------------------------------------------------------------------------------------------------


def test_any_character_is_kept_and_unknown_ones_are_marked() -> None:
    tokenizer = character_tokenizer(["a b\nc", "é—"])
    assert tokenizer.decode(tokenizer("b\n é—a")["input_ids"]) == "b\n é—a"
    assert tokenizer("aXb")["input_ids"][1] == tokenizer.unk_token_id


def save_tokenizer(path: Path, config: dict[str, Any] | None = None, **special: str) -> str:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=character_tokenizer(WORDS).backend_tokenizer, **special)
    tokenizer.save_pretrained(path)
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    return str(path)


def test_a_tokenizer_from_a_folder_and_the_first_token_of_its_model(folder: Folder, tmp_path: Path) -> None:
    special: Any = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    name = save_tokenizer(tmp_path / "t", {"model_type": "t5", "decoder_start_token_id": 0}, **special)
    bundle = folder.load(tokenizer=name)
    assert bundle.facts["bos_token_id"] == 0
    assert bundle.facts["vocab_size"] == 11
    alone = save_tokenizer(tmp_path / "alone", **special)
    assert "does not say which token begins an answer; give decoder_start_token_id" in folder.refused(tokenizer=alone)


def test_a_tokenizer_without_filler_fills_with_its_end(folder: Folder, tmp_path: Path) -> None:
    bundle = folder.load("causal", target=None, tokenizer=save_tokenizer(tmp_path / "t", eos_token="</s>"))
    assert bundle.facts["pad_token_id"] == bundle.facts["eos_token_id"] == bundle.facts["bos_token_id"]
    (batch,) = batches(bundle.test)
    assert (batch["labels"] == bundle.facts["eos_token_id"]).sum() == 4  # each text's own end counts
    assert "neither a filler nor an end token" in folder.refused(tokenizer=save_tokenizer(tmp_path / "u"))


# --- scores and answers -----------------------------------------------------------------------------------------


class Oracle:
    """Knows the right next token of every labelled sequence; `wrong` spoils the first answer."""

    def __init__(self, bundle: DataBundle, causal: bool, wrong: bool = False) -> None:
        self.causal, self.size = causal, bundle.facts["vocab_size"]
        self.eos: int = bundle.facts["eos_token_id"]
        self.next: dict[Any, int] = {}
        for n, batch in enumerate(batches(bundle.test)):
            for i, labels in enumerate(batch["labels"].tolist()):
                tokens = (batch["input_ids"] if causal else batch["decoder_input_ids"])[i].tolist()
                labels = labels[1:] if causal else labels
                key = () if causal else tuple(batch["input_ids"][i].tolist())
                for t, label in enumerate(labels):
                    spoilt = wrong and n == i == 0 and label != IGNORED
                    self.next[(*key, tuple(tokens[: t + 1]))] = (label + 1) % self.size if spoilt else label

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor | None = None) -> Tensor:
        tokens = input_ids if decoder_input_ids is None else decoder_input_ids
        logits = torch.zeros(*tokens.shape, self.size)
        for i, row in enumerate(tokens.tolist()):
            key = () if self.causal else tuple(input_ids[i].tolist())
            for t in range(len(row)):
                token = self.next.get((*key, tuple(row[: t + 1])), self.eos)
                logits[i, t, max(token, 0)] = 1
        return logits


@pytest.mark.parametrize("task", ["seq2seq", "causal"])
def test_a_model_that_knows_the_answers_scores_one(task: str, folder: Folder) -> None:
    bundle = folder.load(task)
    assert bundle.score is not None
    assert bundle.answers is not None
    assert bundle.selection_metric == "exact_match"
    right = Oracle(bundle, task == "causal")
    assert bundle.score(right, bundle.test) == {"exact_match": 1.0, "token_accuracy": 1.0}
    test = WORDS[PARTS["test"]]
    assert bundle.answers(right, bundle.test, 3) == [(w, w[::-1], w[::-1]) for w in test[:3]]
    spoilt = bundle.score(Oracle(bundle, task == "causal", wrong=True), bundle.test)
    assert spoilt["exact_match"] == 0.75
    assert spoilt["token_accuracy"] < 1


def test_scores_of_classes_and_of_plain_texts(folder: Folder) -> None:
    bundle = folder.load("classification")
    assert bundle.score is not None
    assert bundle.answers is not None

    def always_c(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return torch.tensor([[0.0, 0.0, 1.0]]).expand(len(input_ids), 3)

    test = WORDS[PARTS["test"]]
    assert bundle.score(always_c, bundle.test) == {"accuracy": sum(w[0] == "c" for w in test) / 4}
    assert bundle.answers(always_c, bundle.test, 2) == [(w, w[0], "c") for w in test[:2]]
    plain = folder.load("causal", target=None)
    assert plain.score is not None
    assert plain.answers is None
    assert set(plain.score(Oracle(plain, causal=True), plain.test)) == {"token_accuracy"}


def test_greedy_continuation_takes_each_prompts_own_place() -> None:
    """A model whose next token is one more than the last."""

    def counting(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return torch.nn.functional.one_hot((input_ids + 1) % 9, 9).double()

    assert greedy_continue(counting, [[1], [3, 4, 5], [7]], eos=8, pad=0, max_length=4) == [[2, 3, 4, 5], [6, 7], []]


# --- what is refused --------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown task": ({"task": "seq2sec"}, "no task 'seq2sec' (did you mean 'seq2seq'?)"),
    "a missing file": ({"test": "tset.jsonl"}, "test = tset.jsonl: there is no file 'tset.jsonl' (looked for in"),
    "an unknown format": ({"test": __file__}, "files that end in .json, .jsonl, .csv, .tsv, .parquet can be read"),
    "a missing column": ({"target": "anwser"}, "has no column 'anwser' (did you mean 'answer'?); name the one"),
    "a missing source": ({"source": "autor"}, "has no column 'autor' (did you mean 'author'?)"),
    "a missing stream": ({"selection": None}, "there is no selection stream: give selection=..."),
    "a limit that is none": ({"max_length": 0}, "max_length=0 must be a whole number of at least 1"),
    "no room for text": ({"max_target_length": 1}, "max_target_length=1 leaves no room for text"),
    "no batch": ({"batch_size": 0}, "batch_size=0"),
    "a token that is none": ({"decoder_start_token_id": 99}, "must be a token of the vocabulary, from 0 to 10"),
    "a tokenizer that is none": ({"tokenizer": "./nowhere"}, "cannot load tokenizer='./nowhere'"),
    "no target": ({"target": None}, "task='seq2seq' needs a target column"),
    "a subset of files": ({"subset": "de"}, "subset='de' is one of a hub data set; give its name"),
    "an unknown metric": ({"selection_metric": "exact"}, "no metric 'exact' (did you mean 'exact_match'?)"),
    "no hub": ({"name": "nobody/nothing"}, "of 'nobody/nothing' cannot be read"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_one_clear_message(case: str, folder: Folder) -> None:
    options, message = REFUSED[case]
    assert message in folder.refused(**options)


def test_a_missing_package_is_named(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "text needs the package datasets: pip install 'metaopt-chain[text]'" in folder.refused()


def test_bad_content_is_refused_with_its_row(folder: Folder) -> None:
    for name, content, message in (
        ("empty", [], "has no example"),
        ("gap", [{"word": "a", "answer": "b"}, {"word": "c", "answer": None}], "row 2: column 'answer' is empty"),
        ("blank", [{"word": " ", "answer": "b"}], "row 1: column 'word' is empty"),
        ("list", [{"word": ["a"], "answer": "b"}], "row 1: column 'word' holds a list"),
    ):
        assert message in folder.refused(train=write(folder.path / f"{name}.jsonl", content))
    (folder.path / "broken.jsonl").write_text('{"word": \n')
    assert "broken.jsonl cannot be read" in folder.refused(train=str(folder.path / "broken.jsonl"))


def test_classes_that_cannot_be_learned_are_refused(folder: Folder) -> None:
    one = write(folder.path / "one.jsonl", [{"word": "q", "letter": "a"}, {"word": "r", "letter": "a"}])
    assert "every target in train is 'a'" in folder.refused(task="classification", train=one)
    other = write(folder.path / "other.jsonl", [{"word": "q", "letter": "z"}])
    assert "test has the class 'z', which train lacks" in folder.refused(task="classification", test=other)


def test_streams_that_overlap_are_refused(folder: Folder) -> None:
    same = folder.refused(test=folder.files["selection"])
    assert "selection and test share 1 file or split" in same
    leaky = write(folder.path / "leaky.jsonl", rows([WORDS[0], "bag"]))
    message = folder.refused(test=leaky)
    assert f"train and test share 1 of the inputs (such as '{WORDS[0]}')" in message
    assert folder.load(test=leaky, allow_overlap=True).sizes["test"] == 2
    assert folder.load(unlabelled=folder.files["train"]).sizes["unlabelled"] == 8


# --- the command ------------------------------------------------------------------------------------------------


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("task", "cut"), [("seq2seq", "2 of 8 train inputs (longest: 4)"), ("causal", "8 of 8 train")])
def test_the_command_on_files_in_a_foreign_folder(task: str, cut: str, tmp_path: Path) -> None:
    Folder(tmp_path)
    write(tmp_path / "validation.csv", rows(WORDS[PARTS["validation"]]))
    write(tmp_path / "more.parquet", [{"word": word} for word in ("bad", "cage", "fad")])
    streams = ["train=train.jsonl", "validation=validation.csv", "selection=selection.jsonl", "test=test.jsonl"]
    options = [*streams, "unlabelled=more.parquet", f"task={task}", "input=word", "target=answer", "source=author"]
    line = ["data=text", *(f"data.{option}" for option in [*options, "max_length=3", "cache_dir=hf"])]
    line += ["debug=tiny", "trainer.validation_batches=2", "data.validation_batch_size=2", "output.plots=false"]
    line += ["trainer.check_first_step=false", "final.compare=[]", "output.save_models=false"]
    line += ["model=gpt2", "handover=soft_labels"] if task == "causal" else []
    done = command(tmp_path, *line)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(cut) == 1
    assert "bob" in done.stdout
    (result,) = tmp_path.glob("outputs/*/*/result.json")
    found = json.loads(result.read_text())
    assert found["status"] == "complete"
    assert {"exact_match", "token_accuracy", "meta_loss"} <= set(found["metrics"])
    assert len((result.parent / "metrics.jsonl").read_text().splitlines()) == 2
