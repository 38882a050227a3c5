"""Writes the gates' verdicts as JUnit XML, which CI systems show as tests."""

from xml.etree import ElementTree

from glm4_deploy.evaluate.run import Evaluation


def eval_junit(found: Evaluation) -> str:
    """One test case per gate and engine. Its name is the task, so that its history continues when a limit changes."""
    counts = {
        "tests": str(len(found.verdicts)),
        "failures": str(len(found.failed)),
        "errors": "0",
        "skipped": "0",
    }
    suites = ElementTree.Element("testsuites", counts, name="glm4-deploy eval")
    suite = ElementTree.SubElement(suites, "testsuite", counts, name=found.engines[0].label)
    for verdict in found.verdicts:
        row = verdict.row
        case = ElementTree.SubElement(suite, "testcase", classname=row.engine, name=row.task, time="0")
        if verdict.failed:
            ElementTree.SubElement(
                case, "failure", message=verdict.line, type="gate"
            ).text = verdict.gate.text
        ElementTree.SubElement(case, "system-out").text = verdict.line
    ElementTree.indent(suites)
    return ElementTree.tostring(suites, encoding="unicode", xml_declaration=True) + "\n"
