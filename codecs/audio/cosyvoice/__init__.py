"""CosyVoice: supervised semantic speech tokens (`s3`), the speaker encoder (`campplus`), ONNX files (`graph`)."""
