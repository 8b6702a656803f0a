"""BLEU and chrF are sacreBLEU's own figures, for any batching and any number of processes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import sacrebleu

from saccade.errors import UserError
from saccade.metrics.translation import Example, TranslationMetric, doubt

SAID = ["Ein Hund rennt im Schnee.", "Zwei Männer stehen draußen.", "Eine Katze schläft auf dem Sofa."]
MEANT = ["Ein Hund läuft durch den Schnee.", "Zwei Männer stehen draußen.", "Die Katze schläft auf einem Sofa."]


def filled(chosen: list[int]) -> TranslationMetric:
    metric = TranslationMetric("greedy")
    for i in chosen:
        metric.update([Example(i, f"source {i}", SAID[i], MEANT[i])], [2.0 * (i + 1)], 4, 5, 0.5, int(i == 1))
    return metric


def test_figures_are_those_of_the_library() -> None:
    report = filled([2, 0, 1]).compute()
    assert report.bleu == sacrebleu.corpus_bleu(SAID, [MEANT]).score
    assert report.chrf == sacrebleu.corpus_chrf(SAID, [MEANT]).score
    assert "tok:13a" in report.bleu_signature and sacrebleu.__version__ in report.bleu_signature
    assert report.loss == 1.0 and report.perplexity == math.e
    assert (report.texts, report.tokens, report.written, report.tokens_per_second) == (3, 12, 15, 10.0)
    assert report.cut == report.to_dict()["cut"] == 1 and not {"files", "examples"} & report.to_dict().keys()
    assert [example.index for example in report.examples] == [0, 1, 2]


def test_processes_join() -> None:
    one, other = filled([0, 2]), filled([1])
    one.merge(other.state())
    joined, whole = one.compute(), filled([0, 1, 2]).compute()
    assert joined.to_dict() | {"seconds": 0, "tokens_per_second": 0} == whole.to_dict() | {
        "seconds": 0, "tokens_per_second": 0,
    }  # fmt: skip
    assert joined.seconds == 1.0  # side by side


def test_nothing_is_no_measure() -> None:
    with pytest.raises(UserError, match="no text"):
        TranslationMetric("greedy").compute()


def test_languages_without_spaces_are_taken_apart_otherwise(tmp_path: Path) -> None:
    said, meant = "一只狗在雪地里跑。", "一只狗在雪地上跑。"
    reports = {}
    for language in ("zh", "ja", "de", "zh-CN", "zh_Hans", "zho", "jpn", "ZH"):
        metric = TranslationMetric("greedy", language)
        metric.update([Example(0, "A dog.", said, meant)], [1.0], 4, 5, 0.5, 0)
        reports[language] = metric.compute()
    assert "tok:zh" in reports["zh"].bleu_signature and "tok:char" in reports["ja"].bleu_signature
    assert reports["zh"].bleu == sacrebleu.corpus_bleu([said], [[meant]], tokenize="zh").score > 40
    assert reports["de"].bleu < 1
    assert all(reports[name].bleu == reports["zh"].bleu for name in ("zh-CN", "zh_Hans", "zho", "ZH"))
    assert reports["jpn"].bleu == reports["ja"].bleu
    assert "look like Chinese" in doubt("target", [meant]) and "'target'" in doubt("target", [meant])
    assert not any(doubt(*each) for each in (("zh-TW", [meant]), ("de", MEANT), ("target", ["개가 달린다"]), ("", [])))


def test_translations_are_saved_as_they_are(tmp_path: Path) -> None:
    metric = TranslationMetric("greedy")
    metric.update([Example(0, 'He said "hi"', "a\tb\nc", "'")], [1.0], 4, 5, 0.5, 0)
    metric.compute().save(tmp_path)
    lines = (tmp_path / "translations.tsv").read_text(encoding="utf-8").split("\n")
    assert lines == ["source\ttranslation\treference", "He said \"hi\"\ta b c\t'", ""]
