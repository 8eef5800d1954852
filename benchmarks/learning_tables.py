"""The tables of docs/recipes.md and docs/results.md: what models learned."""

import json
import re
import statistics
from pathlib import Path

from ablation_plan import RESULTS, ROWS, read_rows
from ablations import MINUTES
from overlap import RESULTS as OVERLAP
from ten_minutes import RESULTS as TEN_MINUTES
from trainings import check_same_texts, differing, made_with, read_results

from hf_selfattn.tools.evaluation_results import blimp_table, spread, suite_table

WHOLE_TEXT = TEN_MINUTES.with_stem("ten_minutes_whole_text")  # with the articles that hold text of the evaluation
STOCK, STOCK_BUDGET = "stock models: ", 2_000_000
EVALUATIONS = {
    "masked_en": "masked_lm",
    "words_en": "masked_lm and BLiMP",
    "blimp_en": "BLiMP",
    "suite_en": "the suite",
    "suite_zh": "the suite",
}


def signed(values: list[float]) -> str:
    """Their spread, with a sign also above 0."""
    told = spread(values)
    return told if told.startswith("-") else f"+{told}"


def one_a_seed(results: list[dict]) -> list[dict]:
    """Where a seed was run in bf16 and in fp32, its bf16."""
    kept = {result["seed"]: result for result in sorted(results, key=lambda result: result["precision"], reverse=True)}
    return [kept[seed] for seed in sorted(kept)]


def difference(results: list[dict], reference: list[dict]) -> str:
    """Of the losses, over the seeds that both have in the same precision; empty where there are none."""
    losses = {(result["seed"], result["precision"]): result["loss"] for result in reference}
    pairs = one_a_seed([result for result in results if (result["seed"], result["precision"]) in losses])
    values = [result["loss"] - losses[result["seed"], result["precision"]] for result in pairs]
    return signed(values) if values else ""


def at_equal_time(pairs: list[dict]) -> tuple[str, str, str]:
    """Tokens over the default's beside it, the difference of the losses, seeds; empty without pairs."""
    if not pairs:
        return "", "", ""
    tokens = statistics.mean(pair["tokens"] / pair["default"]["tokens"] for pair in pairs)
    return f"{tokens:.2f}", signed([pair["loss"] - pair["default"]["loss"] for pair in pairs]), str(len(pairs))


def check_alike(what: str, results: list[dict]) -> None:
    """Raises ValueError where results that a table would average were made with different options or texts."""
    found = list(map(made_with, results))
    for other in found[1:]:
        if differ := differing(found[0], other):
            raise ValueError(f"{what} has results with different options: {differ}. Remove the lines that are old.")


def results_by_row(path: Path, rows: Path, equal: str, budget: float) -> dict[str, list[dict]]:
    """{row: results} of all rows with that many "tokens" or minutes ("time") for each."""
    found = {row: [] for row in read_rows(rows)[1]}
    results = [result for result in read_results(path) if (result["equal"], result["budget"]) == (equal, budget)]
    for row in dict.fromkeys(result["row"] for result in results if result["row"] not in found):
        print(f"{row!r} is in {path} and no longer in {rows}: left out.")
    for result in results:
        if result["row"] in found:
            found[result["row"]].append(result)
    for row, results_of_row in found.items():
        check_alike(f"{path}: {row!r}", results_of_row)
    check_same_texts(path, results)
    return found


def cells(results: list[dict]) -> tuple[str, str, str]:
    """Nats, accuracy, seeds; empty without results."""
    if not results:
        return "", "", ""
    results = one_a_seed(results)
    accuracy = statistics.mean(result["accuracy"] for result in results)
    return spread([result["loss"] for result in results]), f"{accuracy:.1%}", str(len(results))


def ablations(path: Path = RESULTS, rows: Path = ROWS) -> str:
    """Every row that was run at the default's budget, against the default, at equal tokens and at equal time."""
    found = results_by_row(path, rows, "tokens", read_rows(rows)[0]["max_tokens"])
    timed = results_by_row(path, rows, "time", MINUTES)
    reference = found["default"]
    lines = [
        "| | nats | against the default | accuracy | seeds | at equal time: tokens | against the default | seeds |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row, results in found.items():
        if results or timed[row]:
            nats, *others = cells(results)
            less = "" if row == "default" else difference(results, reference)
            lines.append("| " + " | ".join([row, nats, less, *others, *at_equal_time(timed[row])]) + " |")
    return "\n".join(lines)


def stock_search(path: Path = RESULTS, rows: Path = ROWS) -> str:
    """The stock models at a larger budget."""
    found = results_by_row(path, rows, "tokens", STOCK_BUDGET)
    lines = ["| | precision | nats | accuracy | seeds |", "|---|---|---:|---:|---:|"]
    for row, results in found.items():
        if row.startswith(STOCK):
            for precision in sorted({result["precision"] for result in results}):
                alike = [result for result in results if result["precision"] == precision]
                lines.append("| " + " | ".join([row.removeprefix(STOCK), precision, *cells(alike)]) + " |")
    return "\n".join(lines)


def ten_minutes(language: str, path: Path = TEN_MINUTES) -> str:
    """Ours and the stock models after the same minutes, by precision: one precision is one machine."""
    kinds, found = {}, [each for each in read_results(path) if (each["language"], each["budget"]) == (language, 10)]
    check_same_texts(path, found)
    for result in found:
        kinds.setdefault((result["precision"], result["model"]), []).append(result)
    lines = [
        "| | precision | nats | accuracy | bits per byte | tokens, millions | seeds |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for (precision, name), results in sorted(kinds.items(), key=lambda kind: kind[0][0], reverse=True):
        check_alike(f"{path}: {name!r}, {language}, {precision},", results)
        nats, accuracy, seeds = cells(results)
        bits, tokens = (statistics.mean(result[key] for result in results) for key in ("bits_per_byte", "tokens"))
        name = f"**{name}**" if name == "ours" else name
        lines.append(f"| {name} | {precision} | {nats} | {accuracy} | {bits:.3f} | {tokens / 1e6:.1f} | {seeds} |")
    return "\n".join(lines)


def short(name: str) -> str:
    """The last folder of a model's path."""
    path, scratch, _ = name.partition(" from scratch")
    return Path(path).name + scratch


def shortened(of_models: dict) -> dict:
    names = {short(name): found for name, found in of_models.items()}
    if len(names) < len(of_models):
        raise ValueError(f"Two models of {', '.join(of_models)} have the same last folder. Rename one of the folders.")
    return names


def by_kind(of_models: dict) -> dict[str, list[dict]]:
    """The scores of all seeds of each kind of model (`ten_minutes.py` names the folders)."""
    kinds = {}
    for name, scores in of_models.items():
        kinds.setdefault(re.sub(r"^[a-z]{2}-(.+)-\d+$", r"\1", name), []).append(scores)
    return {f"**{kind}**" if kind == "ours" else kind: scores for kind, scores in kinds.items()}


def masked_by_kind(of_models: dict) -> str:
    """Masked tokens and words, means over the seeds of each kind of model."""
    if len({scores["masked_tokens"]["tokens"] for scores in of_models.values()}) > 1:
        raise ValueError(
            f"{', '.join(of_models)} were asked for different tokens: their tokenizers differ, and nats a token do "
            "not compare. Evaluate models with one tokenizer."
        )
    lines = ["| | nats a masked token | right | bits per byte of masked words | seeds |", "|---|---:|---:|---:|---:|"]
    for kind, scores in by_kind(of_models).items():
        nats = [each["masked_tokens"]["loss"] for each in scores]
        bits = [each["masked_words"]["bits_per_byte"] for each in scores]
        right = statistics.mean(each["masked_tokens"]["accuracy"] for each in scores)
        lines.append(f"| {kind} | {spread(nats)} | {right:.1%} | {spread(bits)} | {len(scores)} |")
    return "\n".join(lines)


def words_by_kind(of_models: dict) -> str:
    """What compares models whose tokenizers differ: masked words and BLiMP, means over the seeds of each kind."""
    lines = ["| | bits per byte of masked words | right | BLiMP | seeds |", "|---|---:|---:|---:|---:|"]
    for kind, scores in by_kind(of_models).items():
        bits = spread([each["masked_words"]["bits_per_byte"] for each in scores])
        right = statistics.mean(each["masked_words"]["accuracy"] for each in scores)
        blimp = spread([100 * each["blimp"]["accuracy"] for each in scores], digits=1)
        lines.append(f"| {kind} | {bits} | {right:.1%} | {blimp} | {len(scores)} |")
    return "\n".join(lines)


def blimp_by_kind(of_models: dict) -> str:
    """BLiMP, means over the seeds of each kind of model, whose number is said."""
    kinds = {kind: [each["blimp"] for each in scores] for kind, scores in by_kind(of_models).items()}
    seeds = {kind: f", {len(scores)} seeds" if len(scores) > 1 else "" for kind, scores in kinds.items()}
    return blimp_table({kind + seeds[kind]: scores for kind, scores in kinds.items()})


def overlap() -> str:
    """What stands in the pretraining text, too, by data set."""
    lines = ["| | looked for | found | |", "|---|---:|---:|---:|"]
    for row in json.loads(OVERLAP.read_text(encoding="utf-8")):
        where = f"{row['data']}, {row['split']}: {', '.join(row['columns'])}"
        share = row["found"] / max(row["looked_for"], 1)
        lines.append(f"| {where} | {row['looked_for']:,} {row['kind']} | {row['found']:,} | {share:.1%} |")
    return "\n".join(lines)


def table_of(name: str, evaluation: dict) -> str:
    """Masked tokens, BLiMP or the suite, from what train/evaluate_models.py wrote to evaluation.json.

    Raises:
        ValueError: that part was not evaluated; two models have the same short name.
    """
    kind = name.split("_")[0]
    measures = {"masked": {"masked_tokens"}, "words": {"masked_words", "blimp"}, "blimp": {"blimp"}}.get(kind)
    if measures:
        part = {model: scores for model, scores in evaluation["models"].items() if measures <= set(scores)}
    else:
        part = evaluation["suite"]
    if not part:
        raise ValueError(
            f"{name} needs {EVALUATIONS[name]}. Run train/evaluate_models.py with that among its --parts."
        )
    if measures:
        return {"masked": masked_by_kind, "words": words_by_kind, "blimp": blimp_by_kind}[kind](shortened(part))
    return suite_table({task: {**found, "models": shortened(found["models"])} for task, found in part.items()})


def evaluated(name: str) -> str:
    return table_of(name, json.loads(RESULTS.with_name(f"{name}.json").read_text(encoding="utf-8")))


def take(source: Path, name: str) -> Path:
    """Keeps an evaluation.json as the results of a table; absolute paths of models become their last folder."""
    text = source.read_text(encoding="utf-8")
    evaluation = json.loads(text)
    table_of(name, evaluation)
    for path in sorted(evaluation["arguments"]["model_name_or_path"], key=len, reverse=True):
        if Path(path).is_absolute():
            text = text.replace(path, short(path))
    kept = RESULTS.with_name(f"{name}.json")
    kept.write_text(text, encoding="utf-8")
    return kept
