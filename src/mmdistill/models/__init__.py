"""Networks and their inputs. Nothing here knows a config or a file."""
