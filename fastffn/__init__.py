"""fastffn: small, fast BERT-like encoders. Importing it needs torch alone."""
