"""As much of a W&B server, on the loopback, as ``wandb sync`` talks to: it keeps what is uploaded."""

import json
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

from tests.loopback import serving


@dataclass
class WandbServer:
    """``files``: of the run, by name. ``artifacts``: by name of the collection, their files by name."""

    files: dict[str, bytes] = field(default_factory=dict)
    artifacts: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def serve(self) -> AbstractContextManager[str]:
        """Serve inside its block, which gets what ``WANDB_BASE_URL`` is set to."""
        return serving(Handler, kept=self)


class Handler(BaseHTTPRequestHandler):
    """Answers of one request."""

    kept: WandbServer

    def log_message(self, *_: object) -> None:
        """Says nothing."""

    def do_POST(self) -> None:
        """A query, or lines of a stream, which are not kept."""
        body = self._body()
        self._answer({"data": self._query(json.loads(body))} if self.path == "/graphql" else {})

    def do_PUT(self) -> None:
        """An upload: ``/files/NAME``, or ``/artifacts/COLLECTION/NAME``."""
        kind, _, name = self.path.strip("/").partition("/")
        if kind == "files":
            self.kept.files[name] = self._body()
        else:
            collection, _, name = name.partition("/")
            self.kept.artifacts[collection][name] = self._body()
        self._answer({})

    def _query(self, query: dict[str, Any]) -> dict[str, Any]:
        given = query.get("variables", {})
        match query.get("operationName"):
            case "UpsertBucket":
                project = {"id": "1", "name": given["project"], "entity": {"id": "1", "name": "me"}}
                empty = {"displayName": "", "description": None, "config": None, "sweepName": None}
                bucket = {"id": "1", "name": given["name"], "project": project, "historyLineCount": 0, **empty}
                return {"upsertBucket": {"bucket": bucket, "inserted": True}}
            case "ServerFeaturesQuery":
                return {"serverInfo": {"features": []}}
            case "CreateRunFiles":
                files = [{"name": name, "uploadUrl": self._url(f"files/{name}")} for name in given["files"]]
                return {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": files}}
            case "CreateArtifact":
                name = given["input"]["artifactCollectionName"]
                self.kept.artifacts[name] = {}
                sequence = {"id": "1", "latestArtifact": None}
                return {"createArtifact": {"artifact": {"id": name, "state": "PENDING", "artifactSequence": sequence}}}
            case "CreateArtifactManifest" | "UpdateArtifactManifest" as operation:
                file = {
                    "id": "1",
                    "uploadUrl": self._url(f"files/{given.get('name', 'manifest')}"),
                    "uploadHeaders": [],
                }
                name = operation[0].lower() + operation[1:]
                return {name: {"artifactManifest": {"id": "1", "file": file}}}
            case "CreateArtifactFiles":
                nodes = [{"node": self._artifact_file(file)} for file in given["input"]["artifactFiles"]]
                return {"createArtifactFiles": {"files": {"edges": nodes}}}
            case "CommitArtifact":
                return {"commitArtifact": {"artifact": {"id": given["artifactID"], "digest": ""}}}
        return {}

    def _artifact_file(self, file: dict[str, Any]) -> dict[str, Any]:
        url = self._url(f"artifacts/{file['artifactID']}/{file['name']}")
        return {
            "storagePath": file["name"],
            "uploadUrl": url,
            "uploadHeaders": [],
            "uploadMultipartUrls": None,
            "artifact": {"id": file["artifactID"]},
        }

    def _url(self, path: str) -> str:
        return f"http://{self.headers['Host']}/{path}"

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, value: Any) -> None:
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
