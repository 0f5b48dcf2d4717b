"""The session service: streams of controls in, streams of generated frames out, over gRPC on Ray Serve."""
