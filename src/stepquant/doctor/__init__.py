"""The doctor: what is wrong with a pipeline, in which layer and from which step on, and what to do.

from stepquant.doctor import examine

candidate = stepquant.load("digits-w4a8", engine="simulated")
diagnosis = examine(candidate, stepquant.open_model("digits-unet"), steps=20)
for finding in diagnosis.findings:
    print(finding.kind, finding.layer, finding.step, finding.what)
print(diagnosis.yaml())
"""

from stepquant.doctor.drivers import Driver
from stepquant.doctor.examination import Diagnosis, examine
from stepquant.doctor.findings import Finding, Thresholds

__all__ = ["Diagnosis", "Driver", "Finding", "Thresholds", "examine"]
