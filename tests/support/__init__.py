"""What several tests need: a server process, a proxy, programs that use a server."""
