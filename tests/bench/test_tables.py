"""A result as CSV and Markdown: every figure in its unit, nothing of what is not valid, and why there is no energy."""

import csv
import io
import re

import pytest

from duo_mlx.bench import tables


def table(text, title):
    """The cells of a Markdown table, a dict a row; a cell ends at a bar that is not escaped."""
    lines = text.split(f"\n## {title}\n\n")[1].split("\n\n")[0].splitlines()
    split = [[part.strip() for part in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines if line.startswith("|")]
    return [dict(zip(split[0], row, strict=True)) for row in split[2:]]


def test_a_row_holds_a_cell_in_the_units_that_it_names(made_result):
    row = tables.rows(made_result())[2]
    assert (row["device"], row["model"], row["route"], row["prompt_tokens"], row["rounds"]) == (
        "Test M9", "embedded", "BBss", 32, 5,
    )  # fmt: skip
    assert [row[f"tpot{part}_ms"] for part in ("", "_low", "_high")] == [16.0, 15.84, 16.16]
    assert (row["ttft_ms"], row["decode_tokens_per_s"], row["prefill_tokens_per_s"]) == (256.0, 62.5, 125.0)
    assert [row[f"inter_token_{name}_ms"] for name in ("p50", "p95", "p99")] == [16.0, 17.6, 20.8]
    joules = [row[f"decode{part}_j_per_token"] for part in ("", "_net", "_net_low")]
    assert joules == pytest.approx([0.32 / 3, 0.096, 0.09504])
    assert row["decode_rails_j_per_token"] == "cpu=0.0266667 gpu=0.08" and row["why_no_energy"] == ""
    assert (row["decode_mean_w"], row["edp_js"]) == pytest.approx((6.4 / 3, 0.00512 / 3))
    assert (row["bytes_per_token"], row["peak_bytes"], row["roofline_percent"]) == (800_000, 2_000_000, 50)
    assert (row["speed_up"], row["byte_ratio"], row["flop_ratio"]) == (1.25, 1.25, 1.25)
    assert [row[f"mix_{name}_percent"] for name in ("big", "small", "skip")] == [50, 50, 0]
    assert (row["loss_nats"], row["argmax_agreement_percent"], row["held_out_tokens"]) == (3.2, 75, 1024)
    assert row["perplexity"] == pytest.approx(24.53253) and row["kl_nats"] == pytest.approx(0.2)


def test_columns_are_the_same_for_every_result(made_result):
    unfinished = made_result()
    unfinished["cells"][0] |= {"summary": None, "quality": None, "runs": []}
    unfinished["cells"][0].pop("strategy_ran")
    columns = [
        list(row) for result in (made_result(), made_result(metered=False), unfinished) for row in tables.rows(result)
    ]
    assert all(names == columns[0] for names in columns)


def test_the_csv_is_the_rows_with_nothing_where_there_is_no_figure(made_result):
    result = made_result(metered=False)
    result["cells"][1]["invalid_why"] = ['a "quoted", long\nreason']
    result["cells"][1]["valid"] = False
    read = list(csv.DictReader(io.StringIO(tables.csv_text(result))))
    assert len(read) == 5
    expected = tables.rows(result)
    assert [{name: "" if value is None else str(value) for name, value in row.items()} for row in expected] == read
    assert read[0]["decode_j_per_token"] == "" and read[0]["why_no_energy"] == "no meter: this is a test"
    assert read[0]["loss_nats"] == "" and read[2]["loss_nats"] == "3.2"
    assert read[1]["tpot_ms"] == read[1]["loss_nats"] == "" and read[1]["invalid_why"] == 'a "quoted", long\nreason'
    assert tables.csv_text(result | {"cells": []}).strip() == ""


def test_the_markdown_has_a_head_that_says_where_and_how(made_result):
    text = tables.markdown(made_result())
    assert text.startswith("# embedded on Test M9\n\n- Machine: Test M9, Darwin-25-arm64, AC Power, powermode 0\n")
    for line in (
        "- Versions: duo-mlx 0.1, mlx 0.32.4, mlx-lm 0.32.2, python 3.11.2",
        "- Every cell: prompt tokens 32, generated tokens 16, batch 1, context 0, quantisation float32",
        "- Energy: a fake SoC (cpu, gpu); idle 2 W",
        "- Roofline: 10 GB/s, products over weights beyond the caches",
        "- Noise floor, the first cell against itself: -0.40 % to +0.40 %",
        "      duo-mlx bench run --preset paper",
    ):
        assert f"\n{line}\n" in text, line
    assert "Not finished" not in text and "Cautions" not in text and "No cell has" not in text
    assert "Not valid" not in text


def test_the_head_knows_a_mac(made_result):
    result = made_result()
    result["system"] |= {
        "device": "Apple M4", "chip": "Apple M4", "model": "Mac16,1", "memory_bytes": 16 * 2**30,
        "os": {"name": "macOS", "version": "26.1", "build": None},
    }  # fmt: skip
    result["sessions"][0] |= {"cautions": ["it runs on Battery Power"], "noise_floor": None}
    text = tables.markdown(result)
    assert "- Machine: Apple M4, Mac16,1, 16 GiB, macOS 26.1, AC Power, powermode 0\n" in text
    assert "- Noise floor, the first cell against itself: not measured\n- Cautions: it runs on Battery Power\n" in text


def test_the_tables_hold_every_valid_cell(made_result):
    text = tables.markdown(made_result())
    speed, energy, quality = (table(text, title) for title in ("Speed", "Energy", "Memory and quality"))
    assert [(row["route"], row["engine"]) for row in speed] == [
        ("big", "mlx-lm"), ("big", "duo-mlx"), ("BBss", "duo-mlx"), ("small", "duo-mlx"), ("skip", "duo-mlx"),
    ]  # fmt: skip
    assert speed[2] == {
        "route": "BBss",
        "engine": "duo-mlx",
        "strategy": "auto (planned)",
        "TPOT ms [95 %]": "16 [15.84, 16.16]",
        "TTFT ms [95 %]": "256 [253.4, 258.6]",
        "decode tok/s": "62.5",
        "prefill tok/s": "125",
        "inter-token ms p50 / p95 / p99": "16 / 17.6 / 20.8",
        "speed-up [95 %]": "1.25 [1.238, 1.262]",
        "byte ratio": "1.25",
        "FLOP ratio": "1.25",
        "% of roofline": "50",
    }
    assert energy[2]["decode J/token [95 %]"] == "0.1067 [0.1056, 0.1077]" and energy[2]["EDP mJ s"] == "1.707"
    assert energy[2]["net of idle [95 %]"] == "0.096 [0.09504, 0.09696]" and energy[2]["mean W"] == "2.133"
    assert (
        quality[2]["% big / small / skip"] == "50 / 50 / 0" and quality[2]["loss nats [95 %]"] == "3.2 [3.168, 3.232]"
    )
    assert quality[0]["perplexity"] == "-"  # of mlx-lm


def test_speculation_is_a_cell_like_others_and_has_a_table_of_its_own(made_result):
    text = tables.markdown(made_result(drafts=True))
    assert table(text, "Speed")[-1]["route"] == "big, drafts by small" and table(text, "Speed")[1]["route"] == "big"
    assert table(text, "Speculation") == [
        {
            "route": "big, drafts by small",
            "engine": "duo-mlx",
            "strategy": "auto (planned)",
            "tokens per verification": "2",
            "verifications": "800",
            "drafted": "1200",
            "accepted": "800",
            "% accepted by position": "75 / 50",
        }
    ]
    assert "Speculation" not in tables.markdown(made_result()) and "No cell has" not in text
    row, other = tables.rows(made_result(drafts=True))[-1], tables.rows(made_result())[1]
    assert (row["route"], row["speculate"], row["draft_tokens"]) == ("big", "small", "auto")
    assert (row["tokens_per_verification"], row["drafted"], row["accepted"]) == (2.0, 1200, 800)
    assert row["accepted_by_position_percent"] == "75 50" and list(row) == list(other)
    assert other["speculate"] is other["drafted"] is None and other["accepted_by_position_percent"] == ""


def test_a_fixed_number_of_drafts_is_named(made_result):
    result = made_result(drafts=True)
    result["cells"][-1]["draft_tokens"] = "3"
    assert table(tables.markdown(result), "Speed")[-1]["route"] == "big, 3 drafts by small"


def test_sizes_are_columns_where_they_vary(made_result):
    text = tables.markdown(made_result(contexts=(0, 64)))
    assert {row["context"] for row in table(text, "Speed")} == {"0", "64"}
    assert "- Every cell: prompt tokens 32, generated tokens 16, batch 1, quantisation float32\n" in text


def test_without_energy_there_is_the_reason_instead_of_a_table(made_result):
    text = tables.markdown(made_result(metered=False))
    assert "- Energy: none: no meter: this is a test\n" in text and not table(text, "Energy")
    said = text.split("## Energy\n\n")[1].split("\n## ")[0]
    assert said.startswith("No cell has: decode J/token, net of idle, mean W, EDP mJ s, prefill J/token, ")
    assert said.endswith("\n\nno meter: this is a test.\n")


def test_a_column_that_is_empty_everywhere_is_named_below(made_result):
    result = made_result()
    result["meter"]["idle"] = None
    for cell in result["cells"]:
        cell["summary"] |= {"roofline_share": None}
        cell["summary"]["decode_energy"] |= {"net_j_per_token": None, "flags": ["uncertain by 3.0%"]}
    result["cells"][0]["summary"] |= {"decode_energy": None, "edp_js": None, "why_no_energy": "its counter stood still"}
    text = tables.markdown(result)
    assert "% of roofline" not in table(text, "Speed")[0] and "No cell has: % of roofline." in text
    assert table(text, "Energy")[0]["decode J/token [95 %]"] == "-" and "No cell has: net of idle." in text
    assert "\nits counter stood still (mlx-lm big auto float32 p32 g16 b1 c0).\n" in text
    assert "\nuncertain by 3.0% (duo-mlx big " in text and "; idle was not measured\n" in text


def test_what_is_not_valid_is_listed_with_its_reason_and_is_in_no_table(made_result):
    result = made_result()
    result["cells"][4] |= {"valid": False, "invalid_why": ["thermal pressure changed from 0 to 2", "round 3"]}
    result["cells"][3] |= {"summary": None, "runs": []}
    result["complete"] = False
    text = tables.markdown(result)
    assert [row["route"] for row in table(text, "Speed")] == ["big", "big", "BBss"]
    assert (
        "## Not valid, and in no table\n\n"
        "- duo-mlx skip auto float32 p32 g16 b1 c0: thermal pressure changed from 0 to 2; round 3\n" in text
    )
    assert "## Not measured yet\n\n- duo-mlx small auto float32 p32 g16 b1 c0: no valid round\n" in text
    assert "**Not finished" in text


def test_a_run_that_has_just_begun_has_a_head_only(made_result):
    text = tables.markdown(made_result() | {"cells": [], "complete": False, "sessions": [], "roofline": None})
    assert "**Not finished" in text and "##" not in text and "Roofline" not in text


def test_what_others_wrote_cannot_break_a_table(made_result):
    result = made_result()
    result["cells"][1]["route"] = "my|file\nof\\|routes <b> `x`"
    rows = table(tables.markdown(result), "Speed")
    assert rows[1]["route"] == r"my\|file of\\\|routes \<b> \`x\`" and rows[1]["engine"] == "duo-mlx"


def test_large_and_small_figures_are_readable():
    assert [tables._number(value) for value in (123456.7, 1234.5, 999.94, 0.0012345, 0.0)] == [
        "123457", "1234", "999.9", "0.001234", "0",
    ]  # fmt: skip
