"""Search products: the query's category, then the most similar products of that category.

Beforehand, with a model that was trained with `aisle train --contrastive`:

    aisle classify products.csv -o classified.csv
    aisle embed products.csv -o vectors.parquet
    aisle index vectors.parquet -o index
"""

import argparse
from pathlib import Path

from aisle.client import Classifier
from aisle.client.index import Index
from aisle.preprocess.tables.table import read_rows

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("query")
parser.add_argument("--classified", type=Path, default=Path("classified.csv"))
parser.add_argument("--index", type=Path, default=Path("index"))
parser.add_argument("--url", default="localhost:8001")
parser.add_argument("--sure", type=float, default=0.8, help="show other categories too if the query's is less sure")
options = parser.parse_args()

categories = [row["category"] for row in read_rows(options.classified)]
index = Index(options.index)
with Classifier(options.url) as classifier:
    (query,) = classifier.classify([options.query])
    vectors, version = classifier.embed_with_version([options.query])
    index.check_model(classifier.fingerprints().get(version, ""))

(hits,) = index.search(vectors, 100)
print(f"{query.category} ({query.confidence:.0%})")
same = [hit for hit in hits if categories[hit.row] == query.category]
for hit in (same if query.confidence >= options.sure else hits)[:10]:
    print(f"{hit.similarity:.3f}  {hit.text}  [{categories[hit.row]}]")
