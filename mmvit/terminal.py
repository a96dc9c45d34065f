"""What the program prints: tables for people, one JSON document for programs."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

Record = Mapping[str, Any]


def print_json(document: Any) -> None:
    """Print one JSON document."""
    print(json.dumps(document, indent=1, ensure_ascii=False, default=str))


def print_predictions(predictions: Sequence[Record]) -> None:
    """Print the best classes of each image."""
    for prediction in predictions:
        table = Table("class", "probability", title=str(prediction["image"]), title_justify="left")
        for entry in prediction["classes"]:
            table.add_row(entry["name"], f"{entry['probability']:.1%}")
        Console().print(table)


def print_hits(hits: Sequence[Record]) -> None:
    """Print search results."""
    table = Table("rank", "cosine", "caption", "where")
    for hit in hits:
        table.add_row(str(hit["rank"]), f"{hit['score']:.3f}", hit["caption"] or "", hit["image_path"])
    Console().print(table)


def print_facts(facts: Record) -> None:
    """Print names and values."""
    table = Table(show_header=False)
    for name, value in facts.items():
        table.add_row(name.replace("_", " "), str(value))
    Console().print(table)


def print_accuracies(rows: Mapping[str, Mapping[str, float]]) -> None:
    """Print zero-shot accuracies by language."""
    table = Table("language", "top-1", "top-5")
    for language, accuracies in rows.items():
        table.add_row(language, f"{accuracies['acc1']:.1%}", f"{accuracies['acc5']:.1%}")
    Console().print(table)
