"""Another taxonomy beside the model's: reading it, proposing pairs, and the columns of classified files."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from pyarrow import parquet

from aisle.client.taxonomy import Counterpart, mapped, read_mapping
from aisle.errors import InputError
from aisle.train.categories.taxonomy import Entry, propose, read_taxonomy
from aisle.train.core.checkpoint import Checkpoint

from .conftest import Server, aisle

# Google's names; the numbers stand for its ids.
ZH = """# Google_Product_Taxonomy_Version: 2021-09-21
1 - 动物/宠物用品
3 - 动物/宠物用品 > 宠物用品 > 猫用品 > 猫粮
4 - 动物/宠物用品 > 宠物用品 > 狗用品 > 狗粮
5 - 电子产品 > 音频设备 > 头戴式耳机与耳麦 > 耳机
6 - 电子产品 > 音频设备 > 音箱
7 - 电子产品 > 通讯 > 电话设备 > 手机配件 > 手机壳
8 - 电子产品 > 电子产品配件 > 电源 > 充电器
9 - 电子产品 > 输入设备 > 键盘
10 - 电子产品 > 输入设备 > 鼠标
11 - 家居与园艺 > 家用电器 > 加湿器
12 - 家居与园艺 > 家用电器 > 吸尘器
13 - 家居与园艺 > 厨房与餐饮 > 厨房电器 > 电饭煲
14 - 服饰与配饰 > 服装 > 连衣裙
15 - 婴幼儿用品 > 尿布 > 纸尿裤
16 - 保健/美容 > 个人护理 > 牙膏
17 - 保健/美容 > 个人护理 > 洗发水
18 - 体育用品 > 户外休闲 > 帐篷
19 - 箱包 > 双肩包
20 - 箱包 > 行李箱
21 - 食品、饮料和烟草 > 饮料 > 咖啡
"""


@pytest.fixture(scope="module")
def taxonomy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("taxonomy") / "taxonomy-with-ids.zh-CN.txt"
    path.write_text(ZH, "utf-8-sig")
    return path


def confirm(table: Path, right: set[tuple[str, str]]) -> None:
    """Write yes into the rows of these categories and entries, as a person does in a spreadsheet."""
    with table.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row["confirmed"] = "Yes" if (row["category"], row["taxonomy_id"]) in right else ""
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@pytest.mark.parametrize(
    ("line", "entry"),
    [
        ("3237 - Animals & Pet Supplies > Live Animals", Entry("3237", "Animals & Pet Supplies > Live Animals")),
        ("Animals & Pet Supplies > Live Animals", Entry("", "Animals & Pet Supplies > Live Animals")),
        (
            "gid://shopify/TaxonomyCategory/ap-2-1            : Animals > Pet Supplies : Birds",
            Entry("gid://shopify/TaxonomyCategory/ap-2-1", "Animals > Pet Supplies : Birds"),
        ),
        ("12 - Sporting Goods>Rugby - Balls", Entry("12", "Sporting Goods > Rugby - Balls")),
    ],
)
def test_the_lines_of_google_and_shopify_are_read(line: str, entry: Entry, tmp_path: Path) -> None:
    path = tmp_path / "taxonomy.txt"
    path.write_text(f"# Version: 1\n# Format\n\n{line}\n")
    assert read_taxonomy(path) == [entry]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"# nothing\n\n", "has no category"),
        (b"1 - A > > B\n", "line 1: '1 - A > > B' has an empty level"),
        (b"1 - A\n2 - A\n", "line 2: 'A' is there twice"),
        (b"1 - A\n1 - B\n", "line 2: line 1 has the same id"),
        (b"1 - \xff\n", "line 1: not UTF-8; convert it to UTF-8, or give its encoding with --encoding"),
        (
            b"".join(b"%d - A > %d\n" % (n, n) for n in range(100_000)) + b"1000000 - \xff\n",
            "line 100001 is not in its encoding; name the right one with --encoding",
        ),
    ],
)
def test_a_faulty_taxonomy_is_refused(content: bytes, complaint: str, checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "taxonomy.txt"
    path.write_bytes(content)
    done = aisle("category", "map", checkpoint, path, "-o", tmp_path / "out.csv")
    assert done.returncode == 2
    assert complaint in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out.csv").exists()


def test_a_taxonomy_in_another_encoding_is_read(checkpoint: Path, taxonomy: Path, tmp_path: Path) -> None:
    path = tmp_path / "taxonomy.txt"
    path.write_bytes(ZH.encode("gb18030").replace(b"\n", b"\r\n"))
    words = ["category", "map", checkpoint, path, "-o", tmp_path / "out.csv"]
    done = aisle(*words)
    assert (done.returncode, "--encoding" in done.stderr) == (2, True)
    done = aisle(*words, "--encoding", "gb18030", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["entries"] == len(read_taxonomy(taxonomy))


def test_the_right_entry_is_among_the_proposals(checkpoint: Path, taxonomy: Path, tmp_path: Path) -> None:
    out = tmp_path / "pairs.csv"
    done = aisle("category", "map", checkpoint, taxonomy, "-o", out, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    labels = Checkpoint(checkpoint).labels
    assert (result["categories"], result["entries"]) == (len(labels), 20)
    with out.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["category"] for row in rows[::3]] == labels == [row["category"] for row in result["best"]]
    assert {row["confirmed"] for row in rows} == {""}
    leaves = {entry.leaf: entry for entry in read_taxonomy(taxonomy)}
    shared = [(label, leaves[leaf]) for label in labels if (leaf := label.rpartition(" > ")[2]) in leaves]
    assert len(shared) > 12
    best = {row["category"]: row["taxonomy"] for row in result["best"]}
    assert all(best[label] == entry.path for label, entry in shared)
    assert "in the language of the categories" not in done.stderr


def test_a_taxonomy_in_another_language_is_noticed(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "google.txt"
    path.write_text("1 - Animals\n2 - Animals > Cat Food\n3 - Electronics > Keyboards\n")
    done = aisle("category", "map", checkpoint, path, "-o", tmp_path / "out.parquet", "--candidates", 5)
    assert done.returncode == 0
    assert "have a name like one in google.txt; give the taxonomy in the language of the categories" in done.stderr
    assert parquet.read_table(tmp_path / "out.parquet").num_rows == 3 * len(Checkpoint(checkpoint).labels)


def test_confirmed_pairs_are_columns_of_classified_files(
    server: Server, checkpoint: Path, taxonomy: Path, tmp_path: Path
) -> None:
    pairs, out = tmp_path / "pairs.csv", tmp_path / "out.jsonl"
    propose(checkpoint, taxonomy, pairs)
    cat_food = next(label for label in Checkpoint(checkpoint).labels if label.endswith("猫粮"))
    confirm(pairs, {(cat_food, "3")})
    texts = tmp_path / "texts.csv"
    texts.write_text("text,taxonomy\n成猫 猫粮 10kg 全价,old\n无线 蓝牙 耳机 降噪,old\n,old\n", "utf-8")
    done = aisle("classify", texts, "-o", out, "--url", server.url, "--taxonomy", pairs)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert [(row["taxonomy_id"], row["taxonomy"], row["source_taxonomy"]) for row in rows] == [
        ("3", "动物/宠物用品 > 宠物用品 > 猫用品 > 猫粮", "old"),
        (None, None, "old"),
        (None, None, "old"),
    ]
    assert "1 rows have a category without a confirmed counterpart" in done.stderr
    refused = aisle("classify", "猫粮", "--url", server.url, "--taxonomy", pairs)
    assert (refused.returncode, "needs a file" in refused.stderr) == (2, True)


def test_sets_of_categories_get_the_counterparts_of_all() -> None:
    mapping = {"a": Counterpart("1", "A"), "b": Counterpart("2", "B"), "c": Counterpart("1", "A")}
    assert mapped(["a", "x", "b", "c"], mapping) == {"taxonomy_id": ["1", "2"], "taxonomy": ["A", "B"]}
    assert mapped([], mapping) == {"taxonomy_id": [], "taxonomy": []}
    assert mapped("x", mapping) == {"taxonomy_id": None, "taxonomy": None}


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ("a,1,A,\n", "no row is confirmed; write yes"),
        ("a,1,A,yes\na,2,B,yes\n", "row 2: 'a' is confirmed twice; keep one"),
        ("a,1,A,maybe\n", "row 1: 'maybe' under confirmed; write yes or leave it empty"),
        ("a,1,,yes\n", "row 1: a name is missing"),
    ],
)
def test_faulty_pairs_are_refused(rows: str, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text(f"category,taxonomy_id,taxonomy,confirmed\n{rows}")
    with pytest.raises(InputError, match=complaint):
        read_mapping(path)
    path.write_text(f"category,taxonomy_id,taxonomy\n{rows}")
    with pytest.raises(InputError, match="has no column confirmed; make the table with aisle category map"):
        read_mapping(path)
