"""The gate's checks as JUnit XML, which CI systems show as tests."""

from typing import Any
from xml.etree import ElementTree

from glm4_deploy.validate.report import Report


def junit_xml(report: Report) -> str:
    """One test case per check; what was not measured counts as skipped."""
    skipped = sum(not check.measured for check in report.checks)
    counts = {"tests": len(report.checks), "failures": len(report.failed), "errors": 0, "skipped": skipped}
    attributes: dict[str, Any] = {name: str(count) for name, count in counts.items()}
    attributes["time"] = str(report.seconds)
    suites = ElementTree.Element("testsuites", attributes, name="glm4-deploy validate")
    name = f"{report.bundle.path}: {report.gate}"
    suite = ElementTree.SubElement(suites, "testsuite", attributes, name=name)
    for check in report.checks:
        name = f"{check.metric} {check.limit:g}"
        case = ElementTree.SubElement(suite, "testcase", classname=report.bundle.path, name=name, time="0")
        if not check.measured:
            ElementTree.SubElement(case, "skipped", message="not measured")
        elif not check.passed:
            ElementTree.SubElement(case, "failure", message=check.line, type="gate").text = _why(report)
    ElementTree.indent(suites)
    return ElementTree.tostring(suites, encoding="unicode", xml_declaration=True) + "\n"


def _why(report: Report) -> str:
    where = "" if report.culprit is None else f"\n{report.culprit.error.name}: {report.culprit.why}"
    return f"{report.bundle.what} against {report.reference.path} on {report.text}{where}"
