"""The OpenAPI document's job is the job that is read."""

from __future__ import annotations

from dataclasses import fields

from intentd.core.jobs.spec import JobSpec
from intentd.daemons.gpu.api import openapi


def test_every_field_of_a_job_is_described() -> None:
    paths = openapi()["paths"]
    known = {item.name for item in fields(JobSpec)} - {"demand_by"} | {"array"}
    for path in ("/api/jobs", "/api/jobs/predict"):
        body = paths[path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert set(body["properties"]) == known
