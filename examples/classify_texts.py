"""Classify a few texts, and mark those that the model is unsure of for review by a person."""

import argparse

from aisle.client import Classifier

TEXTS = ["红富士苹果 5斤装 脆甜", "手机壳 磨砂防摔 适用苹果手机", "usb c cable 2m", "儿童纯棉短袖T恤 110cm"]
MIN_CONFIDENCE = 0.9  # `aisle evaluate` shows the accuracy and the share of accepted texts for each threshold

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--url", default="localhost:8001")
options = parser.parse_args()

with Classifier(options.url) as classifier:
    for text, prediction in zip(TEXTS, classifier.classify(TEXTS, top_k=2), strict=True):
        verdict = "accept" if prediction.confidence >= MIN_CONFIDENCE else "review"
        print(f"{verdict}  {prediction.confidence:.3f}  {prediction.category}  <-  {text}")
