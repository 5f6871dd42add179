"""Digits: a 64-64-32-10 tanh network on scikit-learn's 8×8 digits, in minibatches of 128 and on the
full batch.

python -m analysis.digits [--scale small|full] [--jobs 2] [--check] …
"""

from analysis.study import Scale, Study, main

VARIANTS = {"minibatch": {"batch_size": 128}, "full batch": {"batch_size": 0}}
STUDY = Study(
    "digits",
    {
        "small": Scale(VARIANTS, 200, every=2, aligned=100, tuned=3),
        "full": Scale(VARIANTS, 400, every=2, aligned=100, tuned=3),
        "tiny": Scale(VARIANTS, 20, every=5, aligned=8),
    },
)

if __name__ == "__main__":
    main(STUDY, __doc__)
