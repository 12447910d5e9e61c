"""`zimage serve`: a server that makes pictures and trains LoRAs for a browser, programs and agents (extra `serve`)."""
