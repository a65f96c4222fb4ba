"""DataComp: the rows its publisher ships, and conditions over their columns."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from arrag_runtime.format.errors import BadInputError
from schemas.records import LinkRecord, Reject
from tests.worlds.source_cases import items_of, open_at, parquet_of

REAL_ROWS: list[dict[str, Any]] = [
    {
        "uid": "1e42519d02455c06411394e19509547a",
        "url": "http://ir.ebaystatic.com/f/z135cuakiizkrm1axvchk31meqe.png",
        "text": "Case Cover For LG AKA F520 H778 H788N Finger Ring Kickstand Hard PC Superman",
        "original_width": 82,
        "original_height": 81,
        "clip_b32_similarity_score": 0.22168,
        "clip_l14_similarity_score": 0.183594,
        "face_bboxes": [],
        "sha256": "0bbad39ec51e071a7d7fe98b8c45f63aeb22bc2b2929b35d26ef1c54da3d9bf1",
    },
    {
        "uid": "ae7e54078f7c33deb716db69f7452c9a",
        "url": "https://vignette.wikia.nocookie.net/microheroes-dc/images/8/8b/Earth_18.png"
        "/revision/latest/scale-to-width-down/460?cb=20150129011434",
        "text": "File:Earth 18.png",
        "original_width": 460,
        "original_height": 479,
        "clip_b32_similarity_score": 0.325439,
        "clip_l14_similarity_score": 0.322754,
        "face_bboxes": [],
        "sha256": "76953b125c330bb4708a4183df8d722ced7d9b2c3d0227836058c40d5cc7befe",
    },
    {
        "uid": "4e3a43bebc69f152755dea3f4afbb9cf",
        "url": "https://merchbar.imgix.n…press%252Cformat",
        "text": "Tegan and Sara HEY, I'M JUST LIKE YOU CD",
        "original_width": 390,
        "original_height": 390,
        "clip_b32_similarity_score": 0.324707,
        "clip_l14_similarity_score": 0.348877,
        "face_bboxes": [
            [0.5978988409042358, 0.41332492232322693, 0.6601179838180542, 0.49540361762046814],
            [0.3869307339191437, 0.3955743908882141, 0.44299080967903137, 0.47174572944641113],
        ],
        "sha256": "7b777f9b24519de3b98b2007c4169166082d08ffbf4e50f41910306f92ddf5c3",
    },
    {
        "uid": "fd33fa80dce247ea05fc1e229bf5484d",
        "url": None,
        "text": "红楼梦",
        "original_width": 280,
        "original_height": 280,
        "clip_b32_similarity_score": 0.23291,
        "clip_l14_similarity_score": 0.201904,
        "face_bboxes": [],
        "sha256": "90c3a1ac220b93a4cb516bd593a0477f44775f585aaa693fa054cd7469d7055e",
    },
]
DATACOMP = pa.schema(
    [
        ("uid", pa.string()),
        ("url", pa.string()),
        ("text", pa.string()),
        ("original_width", pa.int64()),
        ("original_height", pa.int64()),
        ("clip_b32_similarity_score", pa.float32()),
        ("clip_l14_similarity_score", pa.float32()),
        ("face_bboxes", pa.list_(pa.list_(pa.float64()))),
        ("sha256", pa.string()),
    ]
)


def test_datacomps_own_rows(tmp_path: Path) -> None:
    """uid, address, text, hash and faces go where they belong; sizes and scores are kept."""
    path = parquet_of(tmp_path / "m" / "a.parquet", REAL_ROWS, schema=DATACOMP)
    items = items_of(open_at("datacomp", path.parent))
    links = [item for item in items if isinstance(item, LinkRecord)]
    for link, row in zip(links, REAL_ROWS[:3], strict=True):
        assert (link.key, link.url, link.caption) == (row["uid"], row["url"], row["text"])
        assert link.sha256 == row["sha256"]
        assert [list(box) for box in link.faces] == row["face_bboxes"]
        kept = json.loads(link.metadata or "")
        assert kept.pop("clip_l14_similarity_score") == pytest.approx(
            row["clip_l14_similarity_score"], rel=1e-6
        )
        assert kept["original_width"] == row["original_width"]
        assert set(kept) == {*("original_width", "original_height", "clip_b32_similarity_score")}
    last = items[3]
    assert isinstance(last, Reject)
    assert (last.row, last.key, last.reason) == (3, REAL_ROWS[3]["uid"], "no-url")
    shown = items_of(open_at("datacomp", path.parent, keep_faces=True))
    assert all(item.faces == () for item in shown if isinstance(item, LinkRecord))


@pytest.mark.parametrize(
    ("where", "rows"),
    [
        ("clip_l14_similarity_score > 0.28", [1, 2]),
        ("original_width >= 390 and original_height < 400", [2]),
        ("url is not null and text like '%Earth%'", [1]),
        ("clip_l14_similarity_score < 0.2 or text = '红楼梦'", [0, 3]),
        ("original_width > 10000", []),
    ],
)
def test_conditions_choose_among_datacomps_rows(
    tmp_path: Path, where: str, rows: list[int]
) -> None:
    """Rows that are not chosen are no inputs: neither records nor rejects, and rows count on."""
    path = parquet_of(tmp_path / "a.parquet", REAL_ROWS, schema=DATACOMP)
    items = items_of(open_at("datacomp", path, where=where))
    assert [item.key for item in items] == [REAL_ROWS[n]["uid"] for n in rows]
    assert [item.row for item in items] == list(range(len(rows)))


def test_a_condition_over_a_column_that_is_not_there(tmp_path: Path) -> None:
    """The error comes before anything runs, and lists the columns."""
    path = parquet_of(tmp_path / "a.parquet", REAL_ROWS, schema=DATACOMP)
    with pytest.raises(BadInputError, match=r"'clip_score'.*uid, url, text, original_width"):
        open_at("datacomp", path, where="clip_score > 1").listing(())
    with pytest.raises(BadInputError, match=r"url is string"):
        open_at("datacomp", path, where="url > 1").listing(())
    parquet_of(tmp_path / "b" / "b.parquet", [{"url": "u", "caption": "c"}])
    with pytest.raises(BadInputError, match=r"--columns datacomp.*'text'.*caption"):
        open_at("datacomp", tmp_path / "b").listing(())
