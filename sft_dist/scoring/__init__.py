"""Answers against ground truth: plain text in, a score from 0 to 1 and its reason out. No model, no torch."""
