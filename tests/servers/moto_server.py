"""moto, which emulates Amazon EventBridge."""



from server import Failure, REPOSITORY, Server


class Moto(Server):
    def prepare(self):
        self.python = REPOSITORY / "target" / "venv" / "bin" / "python"
        if not self.python.exists():
            raise Failure(f"moto is not installed (no {self.python}): run tests/setup")
        self.bin = self.python.parent

    def command(self):
        return [self.python, "-u", "-m", "moto.server", "-H", "127.0.0.1", "-p", self.port]

    def is_ready(self):
        return "Running on http" in self.new_log()

    def url(self):
        return f"http://127.0.0.1:{self.port}"
