"""The datastore: what it finds, what it leaves out, what it aggregates, and what it refuses."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sycoca.captioners.datastore import Datastore, build_datastore
from sycoca.captioners.datastore_files import load_datastore, read_text_file, save_datastore
from sycoca.captioners.datastore_verbs import rows_to_keep
from sycoca.captioners.linear_aligner import LinearAligner
from sycoca.captioners.text_rows import Row, TextRows
from sycoca.captioners.transform import EmbeddingTransform, fit_transform
from sycoca.types import ConfigError, DataError

S, E, K, N = 41, 6, 4, 5
CAPTIONS_AN_IMAGE = 3
INDEXES = ["Flat", "IVF4,Flat"]
L2 = fit_transform(["l2"], lambda: [])


def noise(num: int, seed: int) -> Tensor:
    return torch.randn(num, E, generator=torch.Generator().manual_seed(seed))


def make_rows(num: int = S, *, seed: int = 0, name: str = "image", split: str = "train", fingerprint: str = "mine") -> TextRows:
    rows = [Row(f"{name} text {row}", f"{name}{row // CAPTIONS_AN_IMAGE}", split) for row in range(num)]
    return TextRows(rows, noise(num, seed).numpy(), fingerprint)


def make_store(index: str = "Flat", *, num_probes: int = 4) -> Datastore:
    return build_datastore(make_rows(), L2, index=index, num_probes=num_probes)


def queries() -> Tensor:
    return torch.nn.functional.normalize(noise(N, 7), dim=1)


def brute_force(store: Datastore, query_NE: Tensor, excluded: list[list[str]]) -> list[list[int]]:
    found = []
    for query_E, names in zip(query_NE, excluded, strict=True):
        scores = {row: float(np.dot(store.embedding_SE[row], query_E)) for row in range(len(store))}
        kept = [row for row in scores if store.rows[row].source not in names]
        found.append(sorted(kept, key=lambda row: -scores[row])[:K])
    return found


@pytest.mark.parametrize("index", INDEXES)
def test_search_equals_brute_force(index: str):
    store = make_store(index)
    found = store.search(queries(), K)
    assert found.row_NK.tolist() == brute_force(store, queries(), [[]] * N)
    expected = torch.einsum("ne,nke->nk", queries(), torch.from_numpy(store.embedding_SE)[found.row_NK])
    torch.testing.assert_close(found.score_NK, expected)
    assert store.texts(found.row_NK)[0][0] == store.rows[found.row_NK[0, 0]].text


@pytest.mark.parametrize("index", INDEXES)
def test_an_excluded_image_s_texts_are_never_found_and_k_remain(index: str):
    store = make_store(index)
    first = store.search(queries(), 2).row_NK.tolist()
    excluded = [sorted({store.rows[row].source for row in row_K}) for row_K in first]
    excluded[1] = []
    excluded[2].append("an image that is not there")
    found = store.search(queries(), K, exclude_sources=excluded)
    assert found.row_NK.tolist() == brute_force(store, queries(), excluded)
    assert found.row_NK[1, :2].tolist() == first[1]


def test_an_inverted_index_looks_into_more_lists_until_k_remain():
    store = make_store("IVF4,Flat", num_probes=1)
    found = store.search(queries(), S).row_NK
    assert [sorted(row_K) for row_K in found.tolist()] == [list(range(S))] * N


def test_the_exact_index_finds_everything_but_the_excluded():
    store = make_store()
    found = store.search(queries()[:1], S - CAPTIONS_AN_IMAGE, exclude_sources=[["image2"]]).row_NK
    assert sorted(found[0].tolist()) == [row for row in range(S) if not 6 <= row < 9]


def softmax_mean(store: Datastore, query_E: Tensor, temperature: float) -> np.ndarray:
    rows = store.embedding_SE.astype(np.float64)
    query = query_E.double().numpy()
    cosines = [row @ query / np.linalg.norm(row) / np.linalg.norm(query) for row in rows]
    weights = [np.exp(temperature * (cosine - max(cosines))) for cosine in cosines]
    return sum(weight * row for weight, row in zip(weights, rows, strict=True)) / sum(weights)


@pytest.mark.parametrize("temperature", [0.5, 30.0, 175.0, 1e4])
def test_aggregate_is_the_softmax_mean_of_the_whole_store_in_any_blocks(temperature: float, monkeypatch: pytest.MonkeyPatch):
    store = build_datastore(make_rows(), EmbeddingTransform())
    query_NE = 3 * noise(N, 7)
    whole = store.aggregate(query_NE, temperature)
    for row, query_E in zip(whole, query_NE, strict=True):
        np.testing.assert_allclose(row.numpy(), softmax_mean(store, query_E, temperature), rtol=1e-4, atol=1e-6)
    monkeypatch.setattr("sycoca.captioners.datastore.BLOCK_ROWS", 7)
    torch.testing.assert_close(store.aggregate(query_NE, temperature), whole)


def test_aggregate_goes_from_the_mean_to_the_nearest_row():
    store = make_store()
    rows_SE = torch.from_numpy(store.embedding_SE)
    torch.testing.assert_close(store.aggregate(queries(), 0.0), rows_SE.mean(0).expand(N, -1))
    nearest = store.search(queries(), 1).row_NK[:, 0]
    torch.testing.assert_close(store.aggregate(queries(), 1e6), rows_SE[nearest])


@pytest.mark.parametrize("index", INDEXES)
def test_rows_are_added_swapped_and_filtered(index: str):
    store, more = make_store(index), make_rows(11, seed=5, name="new")
    store.extend(more)
    assert len(store) == S + 11
    place = store.search(torch.from_numpy(store.embedding_SE[-1:]), 1).row_NK.item()
    assert store.rows[place].text == "new text 10"
    assert store.search(queries(), K).row_NK.tolist() == brute_force(store, queries(), [[]] * N)
    store.filter(lambda row: row.source.startswith("image"))
    assert len(store) == S
    assert store.search(queries(), K).row_NK.tolist() == make_store().search(queries(), K).row_NK.tolist()
    store.swap(more)
    assert {text for texts in store.texts(store.search(queries(), K).row_NK) for text in texts} <= {r.text for r in more.rows}


def test_rows_are_kept_by_score_origin_and_split():
    rows = [Row("a", "1", score=0.5), Row("b", "1", origin="synthetic", score=0.2), Row("c", "2", "restval")]
    store = build_datastore(TextRows(rows, noise(3, 0).numpy(), "mine"), L2)
    kept = [[row.text for row in rows if rows_to_keep(**{"min_score": None, "origin": None, "split": None, **asked})(row)]
            for asked in ({}, {"min_score": 0.5}, {"origin": "synthetic"}, {"split": "restval"})]  # fmt: skip
    assert kept == [["a", "b", "c"], ["a"], ["b"], ["c"]]
    seen = store.inspect()
    assert (seen["num_rows"], seen["num_sources"], seen["num_scored"]) == (3, 2, 2)
    assert seen["mean_score"] == pytest.approx(0.35)
    assert seen["origins"] == {"human": 2, "synthetic": 1} and seen["splits"] == {"train": 2, "restval": 1}


@pytest.mark.parametrize("index", INDEXES)
def test_a_saved_datastore_finds_the_same(index: str, tmp_path: Path):
    transform = fit_transform(["l2", "centre", "l2"], lambda: [noise(S, 0)])
    rows = make_rows()
    rows.rows[3] = Row("scored", "image1", "train", "synthetic", 0.25)
    store = build_datastore(rows, transform, index=index, num_probes=3)
    save_datastore(store, tmp_path)
    loaded = load_datastore(tmp_path)
    assert isinstance(loaded.embedding_SE, np.memmap)
    assert loaded.rows[3] == store.rows[3] and [row[:4] for row in loaded.rows] == [row[:4] for row in store.rows]
    assert (loaded.index.name, loaded.index.num_probes, loaded.fingerprint) == (index, 3, "mine")
    before, after = (one.search(queries(), K, exclude_sources=[["image3"]] * N) for one in (store, loaded))
    assert torch.equal(before.row_NK, after.row_NK) and torch.equal(before.score_NK, after.score_NK)
    loaded.extend(make_rows(4, seed=3, name="new"))
    torch.testing.assert_close(torch.from_numpy(loaded.embedding_SE[-4:]), transform(noise(4, 3)))
    save_datastore(loaded, tmp_path)
    assert len(load_datastore(tmp_path)) == S + 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000002", "meta.json"]


def test_a_save_that_breaks_off_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = make_store()
    save_datastore(store, tmp_path)
    store.extend(make_rows(4, seed=3, name="new"))

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("sycoca.captioners.datastore_files.save_text", fail)
    with pytest.raises(OSError, match="disk full"):
        save_datastore(store, tmp_path)
    assert len(load_datastore(tmp_path)) == S
    monkeypatch.undo()
    save_datastore(store, tmp_path)
    assert len(load_datastore(tmp_path)) == S + 4


@pytest.mark.parametrize("split", ["val", "test", "minival"])
def test_held_out_rows_are_refused_unless_allowed(split: str):
    held_out = make_rows(split=split)
    with pytest.raises(DataError, match=rf"split {split}.*--allow-held-out"):
        build_datastore(held_out, L2)
    store = build_datastore(held_out, L2, allow_held_out=True)
    with pytest.raises(DataError, match="--allow-held-out"):
        store.swap(held_out)
    with pytest.raises(DataError, match="--allow-held-out"):
        store.extend(held_out)
    store.extend(held_out, allow_held_out=True)
    assert len(store) == 2 * S


def test_encoder_aligner_and_datastore_must_belong_together():
    store, other = make_store(), make_rows(fingerprint="other")
    for change in (store.extend, store.swap):
        with pytest.raises(DataError, match=r"encoder mine .* used with other"):
            change(other)
    fitted, elsewhere = (fit_transform(["l2", "centre"], lambda rows=rows: [rows]) for rows in (noise(S, 0), noise(S, 1)))
    store = build_datastore(make_rows(), fitted.then_l2())
    aligner = LinearAligner(torch.eye(E), fitted, fitted, "mine", "mine", "ols", 3)
    store.check_aligner(aligner)
    build_datastore(make_rows(), fitted).check_aligner(aligner)
    with pytest.raises(DataError, match="--aligner"):
        store.check_aligner(LinearAligner(torch.eye(E), fitted, elsewhere, "mine", "mine", "ols", 3))
    with pytest.raises(DataError, match="do not belong together"):
        store.check_aligner(LinearAligner(torch.eye(E), fitted, fitted, "mine", "other", "ols", 3))


def test_what_cannot_be_searched_says_so():
    store = make_store()
    for k in (0, S + 1):
        with pytest.raises(DataError, match=f"{k} rows asked of a datastore of {S}"):
            store.search(queries(), k)
    with pytest.raises(DataError, match="3 of them excluded"):
        store.search(queries(), S, exclude_sources=[["image0"], [], [], [], []])
    with pytest.raises(DataError, match="one collection a query"):
        store.search(queries(), K, exclude_sources=[[]])
    with pytest.raises(DataError, match="queries of 6 numbers"):
        store.search(queries()[:, :5], K)
    with pytest.raises(DataError, match="finite queries"):
        store.aggregate(queries() * torch.nan, 1.0)
    with pytest.raises(ConfigError, match="0 or more"):
        store.aggregate(queries(), -1.0)
    assert store.search(queries()[:0], K).row_NK.shape == (0, K)


def test_what_cannot_be_built_says_so(tmp_path: Path):
    with pytest.raises(DataError, match="without rows"):
        build_datastore(make_rows(0), L2)
    with pytest.raises(DataError, match="none is left"):
        make_store().filter(lambda row: False)
    with pytest.raises(DataError, match="41 rows with 40 embeddings"):
        build_datastore(TextRows(make_rows().rows, make_rows().embedding_SE[1:], "mine"), L2)
    with pytest.raises(DataError, match="NaN"):
        build_datastore(TextRows(make_rows().rows, np.full((S, E), np.nan, np.float32), "mine"), L2)
    with pytest.raises(ConfigError, match="'Nonsense'"):
        build_datastore(make_rows(), L2, index="Nonsense")
    with pytest.raises(DataError, match="cannot be trained on 41 rows"):
        build_datastore(make_rows(), L2, index="IVF64,Flat")
    with pytest.raises(DataError, match="no datastore there"):
        load_datastore(tmp_path)
    (tmp_path / "meta.json").write_text('{"kind": "embedding store"}')
    with pytest.raises(DataError, match="found 'embedding store'"):
        load_datastore(tmp_path)


def test_texts_are_read_from_lines_and_from_json(tmp_path: Path):
    plain, table = tmp_path / "texts.txt", tmp_path / "texts.jsonl"
    plain.write_text("a dog\n\n a cat \n")
    assert [(row.text, row.source, row.split, row.origin) for row in read_text_file(plain)] == [
        ("a dog", "", "train", "human"), ("a cat", "", "train", "human")]  # fmt: skip
    table.write_text('{"text": "a dog", "source": "7", "origin": "synthetic", "score": 0.5}\n')
    assert read_text_file(table) == [Row("a dog", "7", "train", "synthetic", 0.5)]
    for line in ('{"text": "x", "colour": 1}', "{", "[1]", '{"source": "7"}', '{"text": 3}', '{"text": "x", "origin": "god"}'):
        table.write_text('{"text": "a dog"}\n' + line)
        with pytest.raises(DataError, match="jsonl:2: expected"):
            read_text_file(table)
