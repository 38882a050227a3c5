"""Writes the gate's checks as JUnit XML, which CI systems show as tests."""

from typing import Any
from xml.etree import ElementTree

from glm4_deploy.validate.report import Report


def junit_xml(report: Report) -> str:
    """One test case per check. A metric that was not measured or not judged counts as skipped.

    A case's name is its metric only, so that its history continues when a limit changes.
    """
    skipped = sum(not (check.measured and check.judged) for check in report.checks)
    counts = {"tests": len(report.checks), "failures": len(report.failed), "errors": 0, "skipped": skipped}
    attributes: dict[str, Any] = {name: str(count) for name, count in counts.items()}
    attributes["time"] = str(report.seconds)
    suites = ElementTree.Element("testsuites", attributes, name="glm4-deploy validate")
    name = f"{report.bundle.path}: {report.gate}"
    suite = ElementTree.SubElement(suites, "testsuite", attributes, name=name)
    for check in report.checks:
        case = ElementTree.SubElement(
            suite, "testcase", classname=report.bundle.path, name=check.metric, time="0"
        )
        if not check.measured:
            ElementTree.SubElement(case, "skipped", message="not measured")
        elif not check.judged:
            ElementTree.SubElement(case, "skipped", message="not judged: the text is unfit or too short")
        elif not check.passed:
            ElementTree.SubElement(case, "failure", message=check.line, type="gate").text = _why(report)
        ElementTree.SubElement(case, "system-out").text = check.line
    ElementTree.indent(suites)
    return ElementTree.tostring(suites, encoding="unicode", xml_declaration=True) + "\n"


def _why(report: Report) -> str:
    where = "" if report.culprit is None else f"\n{report.culprit.error.name}: {report.culprit.why}"
    return f"{report.bundle.what} against {report.reference.path} on {report.text}{where}"
