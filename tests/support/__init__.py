"""What tests share: small random models, official code, inputs, and one way to compare numbers."""
