"""Search in a datastore of a million captions: an inverted index (IVF) against the exact one, time and recall.

    OMP_NUM_THREADS=2 python benchmarks/datastore.py [--rows 1000000] [--width 96] [--index IVF1024,Flat]

Synthetic unit rows around --clusters centres, as captions of a few thousand things would lie; queries are new ones drawn the
same way, and each leaves out one image's five captions. Both sides search the same queries; recall is the share of the exact
index's --k rows that the inverted one finds. Brute force in NumPy checks the exact side on some of the queries. The table goes
to standard error; the last line of standard output is JSON.
"""

import argparse
import json
import sys
import time

import faiss
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sycoca.captioners.datastore import Datastore, build_datastore
from sycoca.captioners.text_rows import Row, TextRows
from sycoca.captioners.transform import EmbeddingTransform

CAPTIONS_AN_IMAGE, NUM_CHECKED, SPREAD = 5, 20, 0.7


def main() -> None:
    args = _parse()
    faiss.omp_set_num_threads(args.threads)
    torch.set_num_threads(args.threads)
    random = np.random.default_rng(0)
    centres = unit(random.standard_normal((args.clusters, args.width), dtype=np.float32))
    embedding_SE, query_NE = draw(centres, args.rows, random), draw(centres, args.queries, random)
    rows = [Row("", str(number // CAPTIONS_AN_IMAGE)) for number in range(args.rows)]
    contents = TextRows(rows, embedding_SE, "synthetic")
    excluded = [[str(number)] for number in random.integers(0, args.rows // CAPTIONS_AN_IMAGE, args.queries)]
    sides, found, result = {"exact": "Flat", "ivf": args.index}, {}, {}
    for side, index in sides.items():
        start = time.perf_counter()
        datastore = build_datastore(contents, EmbeddingTransform(), index=index, num_probes=args.probes)
        result[f"{side}_build_seconds"] = time.perf_counter() - start
        found[side], result[f"{side}_search_seconds"] = search(datastore, torch.from_numpy(query_NE), args.k, excluded)
    check(found["exact"][:NUM_CHECKED], embedding_SE, query_NE[:NUM_CHECKED], excluded)
    hits = [len(set(a) & set(b)) for a, b in zip(found["exact"].tolist(), found["ivf"].tolist(), strict=True)]
    result |= {"recall": float(np.mean(hits)) / args.k, "ratio": result["exact_search_seconds"] / result["ivf_search_seconds"]}
    for name, value in result.items():
        print(f"{name:22s} {value:9.3f}", file=sys.stderr)
    print(json.dumps({"benchmark": "datastore", **vars(args), **{k: round(v, 4) for k, v in result.items()}}), flush=True)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--clusters", type=int, default=4000)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--k", type=int, default=4, help="rows a query (SmallCap's 4)")
    parser.add_argument("--index", default="IVF1024,Flat")
    parser.add_argument("--probes", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def unit(rows_NE: NDArray[np.float32]) -> NDArray[np.float32]:
    return rows_NE / np.linalg.norm(rows_NE, axis=1, keepdims=True)


def draw(centres: NDArray[np.float32], num: int, random: np.random.Generator) -> NDArray[np.float32]:
    """Unit rows, each a centre and noise of SPREAD of its length."""
    noise = random.standard_normal((num, centres.shape[1]), dtype=np.float32) * np.float32(SPREAD / centres.shape[1] ** 0.5)
    return unit(centres[random.integers(0, len(centres), num)] + noise)


def search(datastore: Datastore, query_NE: Tensor, k: int, excluded: list[list[str]]) -> tuple[Tensor, float]:
    """The rows found, and the seconds of the second of two searches."""
    for _ in range(2):
        start = time.perf_counter()
        row_NK = datastore.search(query_NE, k, exclude_sources=excluded).row_NK
        seconds = time.perf_counter() - start
    return row_NK, seconds


def check(
    found_NK: Tensor, embedding_SE: NDArray[np.float32], query_NE: NDArray[np.float32], excluded: list[list[str]]
) -> None:
    """The exact index finds what brute force finds; scores may tie to rounding."""
    score_NS = query_NE @ embedding_SE.T
    for score_S, found_K, [source] in zip(score_NS, found_NK.numpy(), excluded):
        score_S[int(source) * CAPTIONS_AN_IMAGE :][:CAPTIONS_AN_IMAGE] = -np.inf
        best_K = np.sort(score_S)[::-1][: len(found_K)]
        np.testing.assert_allclose(np.sort(score_S[found_K])[::-1], best_K, atol=1e-5)


if __name__ == "__main__":
    main()
