"""Output of the program: tables for people, one JSON document for programs."""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

Record = Mapping[str, Any]


def print_json(document: Any) -> None:
    """Print one JSON document; characters that standard output cannot print are written as JSON escapes."""
    text = json.dumps(document, indent=1, ensure_ascii=False, default=str)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(document, indent=1, default=str)
    print(text)


def print_predictions(predictions: Sequence[Record]) -> None:
    """Print the top classes of each image: of one a table, of several one line each."""
    if len(predictions) > 1:
        table = Table("image", "classes, with their probabilities")
        for prediction in predictions:
            classes = (f"{entry['name']} {entry['probability']:.1%}" for entry in prediction["classes"])
            table.add_row(_plain(prediction["image"]), _plain(", ".join(classes)))
        Console().print(table)
        return
    for prediction in predictions:
        table = Table("class", "probability", title=_plain(prediction["image"]), title_justify="left")
        for entry in prediction["classes"]:
            table.add_row(_plain(entry["name"]), f"{entry['probability']:.1%}")
        Console().print(table)


def print_hits(hits: Sequence[Record]) -> None:
    """Print search results."""
    table = Table("rank", "cosine", "caption", "where")
    for hit in hits:
        table.add_row(str(hit["rank"]), f"{hit['score']:.3f}", _plain(hit["caption"] or ""), _plain(hit["image_path"]))
    Console().print(table)


def print_configs(configs: Sequence[Record]) -> None:
    """Print the built-in configs, one after the other."""
    for config in configs:
        print(f"{config['name']}\n    {config['about']}")
        facts = [f"{name}: {config[name]}" for name in ("hardware", "time") if config[name]]
        if facts:
            print(f"    {'; '.join(facts)}")


def print_facts(facts: Record) -> None:
    """Print names and values."""
    table = Table(show_header=False)
    for name, value in facts.items():
        table.add_row(_plain(name.replace("_", " ")), _plain(value))
    Console().print(table)


def print_accuracies(rows: Mapping[str, Mapping[str, float]]) -> None:
    """Print zero-shot accuracies by language."""
    table = Table("language", "top-1", "top-5")
    for language, accuracies in rows.items():
        table.add_row(_plain(language), f"{accuracies['acc1']:.1%}", f"{accuracies['acc5']:.1%}")
    Console().print(table)


def _plain(value: object) -> Text:
    """Return literal text: rich would interpret "[1]" in a plain str as markup."""
    return Text(str(value))
