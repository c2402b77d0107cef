"""The memory part of `fedspeed bench`: its model, rows and page."""

from benchmarks.compare.memory.command import Model, prepare
from benchmarks.compare.memory.records import Memory, Size, read
from benchmarks.compare.memory.report import page, write
from fedspeed.config.load import load
from fedspeed.models.catalogue import shape_of
from tests.benchmarks.test_compare import GIB, a_run


def test_a_model_comes_with_its_rows_and_run(tmp_path):
    size = prepare(tmp_path, Model(3, 64), 100)
    assert size.parameters == shape_of(str(tmp_path / "base")).total
    assert (size.blocks, size.hidden, size.runs) == (3, 64, ())
    config = load(tmp_path / "run.yaml").config
    assert (config.model.dtype, config.train.micro_batch, config.data.clients) == ("bf16", 1, 1)
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert len(lines) == 2 and lines[0] != lines[1]


def test_the_page_compares_with_the_first_method(tmp_path):
    def size(blocks, hidden, own, other):
        runs = (a_run("fedspeed_ram", device=own), a_run("fs_llm", device=other))
        return Size(blocks=blocks, hidden=hidden, parameters=blocks * 10**8, runs=runs)

    sizes = (size(22, 2048, GIB, 13 * GIB), size(6, 1024, GIB // 2, GIB))
    titles = {"fedspeed_ram": "ours", "fs_llm": "theirs"}
    memory = Memory.now(sizes, titles, 1000, 11.0)
    text = page(memory)
    assert "| theirs | 1.00 GiB (2.00x) | 13.0 GiB (13.00x) | 1.0000 |" in text
    assert "- theirs does not fit in 11 GiB with 22 blocks of 2048: it needs 13.0 GiB." in text
    write(memory, tmp_path)
    assert read(tmp_path / "memory.json").sizes == sizes
    assert (tmp_path / "memory.png").read_bytes()[:4] == b"\x89PNG"
