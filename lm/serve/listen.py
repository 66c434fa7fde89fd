"""Binds the sockets of the server."""

import errno
import socket

from lm import schema


def resolve(host: str, port: int) -> list[tuple[int, tuple]]:
  """Resolves `host` to (family, address) pairs; ConfigError on failure."""
  try:
    found = socket.getaddrinfo(
      host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
  except (socket.gaierror, UnicodeError) as error:
    raise schema.ConfigError(
      f"--host={host}: does not resolve ({error}); name an address of this "
      "machine"
    ) from error
  return list(dict.fromkeys((family, where) for family, *_, where in found))


def bind(host: str, port: int) -> list[socket.socket]:
  """Binds a socket to each address of `host`, all on the same port; no socket
  listens yet. Port 0 picks a free port.

  Raises RunError on a taken or privileged port, ConfigError on an unknown host
  or an address of another machine, and OSError otherwise.
  """
  sockets: list[socket.socket] = []
  try:
    for family, address in resolve(host, port):
      one = socket.socket(family)
      sockets.append(one)
      one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
      if family == socket.AF_INET6:
        one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
      one.bind((address[0], port, *address[2:]))
      port = one.getsockname()[1]
  except OSError as error:
    for one in sockets:
      one.close()
    raise _explained(error, host, port) from error
  return sockets


def listen(host: str, sockets: list[socket.socket]) -> None:
  """Lets the sockets of `bind(host, ...)` listen.

  Raises RunError if another process does, on the same port: until one listens,
  two may bind it.
  """
  for one in sockets:
    try:
      one.listen(2048)
    except OSError as error:
      port = one.getsockname()[1]
      raise _explained(error, host, port) from error


def _explained(error: OSError, host: str, port: int) -> Exception:
  where = f"--host={host} --port={port}"
  return {
    errno.EADDRINUSE: schema.RunError(
      f"{where}: the port is taken; name another, or 0 for any that is free"
    ),
    errno.EACCES: schema.RunError(
      f"{where}: the port is for privileged users; name one from 1024 on"
    ),
    errno.EADDRNOTAVAIL: schema.ConfigError(
      f"{where}: that is no address of this machine; name one that is"
    ),
  }.get(error.errno or 0, error)
