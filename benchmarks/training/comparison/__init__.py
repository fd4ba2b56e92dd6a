"""`make compare`: fine-tuning the shipped networks every way there is, accuracy against cost.

``entries.py`` lists what is compared, each as its difference from plain fine-tuning; ``runs.py``
tunes, trains and measures, and keeps what is finished; ``report.py`` shows it.
"""
