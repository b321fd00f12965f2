"""The demo: generated clinical training data, and a tokenizer and a model small enough for two CPU cores.

The data is for demonstration. Nothing here is medical advice.
"""
