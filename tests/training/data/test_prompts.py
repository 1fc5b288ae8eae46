"""Prompts of a file, in any of its formats."""

import csv
import json

import datasets
import pytest

from diffusers_dmp.training.data.prompts import prompts_of, prompts_sha256, read_prompts

PROMPTS = ["a cat", 'a "big" dog, running', "ein Haus in Köln\u2028 am Rhein"]


def write(folder, suffix: str, prompts: list, column: str = "prompt"):
    path = folder / f"prompts.{suffix}"
    rows = [{"id": number, column: prompt} for number, prompt in enumerate(prompts)]
    if suffix == "txt":
        path.write_bytes("".join(f"{prompt}\r\n" for prompt in prompts).encode("utf-8-sig"))
    elif suffix == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif suffix == "json":
        path.write_text(json.dumps(rows))
    elif suffix == "csv":
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, ["id", column])
            writer.writeheader()
            writer.writerows(rows)
    else:
        datasets.Dataset.from_list(rows).to_parquet(path)
    return path


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "json", "csv", "parquet"])
def test_formats(suffix, tmp_path):
    assert read_prompts(write(tmp_path, suffix, PROMPTS)) == PROMPTS
    assert read_prompts(write(tmp_path, suffix, PROMPTS, "caption"), "caption") == PROMPTS


def test_a_json_list_of_strings(tmp_path):
    (tmp_path / "prompts.json").write_text(json.dumps(PROMPTS))
    assert read_prompts(tmp_path / "prompts.json") == PROMPTS


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "csv", "parquet"])
def test_an_empty_prompt_is_named(suffix, tmp_path):
    place = "line" if suffix in ("txt", "jsonl") else "row"
    with pytest.raises(ValueError, match=f"a prompt in each {place}, but {place} 2 is empty"):
        read_prompts(write(tmp_path, suffix, ["a cat", " ", "a dog"]))


def test_files_without_prompts(tmp_path):
    table = write(tmp_path, "jsonl", PROMPTS, "caption")
    with pytest.raises(
        ValueError, match="the column 'prompt', but line 1 has id, caption; `--prompt_column` names it"
    ):
        read_prompts(table)
    with pytest.raises(ValueError, match="a prompt in each line, but line 1 is 0"):
        read_prompts(table, "id")
    for name, content, said in [
        ("empty.txt", "", "to be text, but got an empty file"),
        ("empty.json", "[]", "to hold prompts, but got none"),
        ("prompts.json", "{}", "a JSON list of prompts, but got dict"),
        ("broken.jsonl", '"a cat"\n{', "to be JSON lines, but line 2 is not"),
        ("prompts.docx", "a cat", "in a file of .txt, .jsonl, .json, .csv, .parquet, but got"),
        ("prompts.parquet", "a cat", "a whole parquet file"),
    ]:
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=said):
            read_prompts(tmp_path / name)
    with pytest.raises(OSError, match="there is no such file"):
        read_prompts(tmp_path / "missing.txt")


def test_every_prompt_in_turn():
    assert prompts_of(range(1, 6), ["a", "b"]) == ["b", "a", "b", "a", "b"]


def test_the_hash_is_that_of_the_prompts_in_their_order():
    hashes = {prompts_sha256(each) for each in (["a", "b"], ["b", "a"], ["a"], ["a b"])}
    assert len(hashes) == 4 and prompts_sha256(("a", "b")) == prompts_sha256(["a", "b"])
