"""cluster/kuberay: valid by the published schemas, safe, and alike where they have to be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

import qbrec
from qbrec.config import load_config
from qbrec.config.sections import ComputeConfig
from tests.support.cli import ROOT
from tests.support.manifests import KUBERAY, differences, objects, pod_templates, problems
from tests.support.pins import pins

CLUSTERS = ("raycluster", "raycluster-elastic", "rayjob", "rayjob-elastic")
JOBS = ("rayjob", "rayjob-elastic")


def one(name: str) -> dict[str, Any]:
    (tree,) = objects(KUBERAY / f"{name}.yaml")
    return tree


def cluster_of(tree: dict[str, Any]) -> dict[str, Any]:
    return tree["spec"].get("rayClusterSpec", tree["spec"])


def containers(tree: dict[str, Any]) -> list[dict[str, Any]]:
    return [c for template in pod_templates(tree).values() for c in template["spec"]["containers"]]


def gibibytes(quantity: str) -> int:
    assert quantity.endswith("Gi")
    return int(quantity.removesuffix("Gi"))


class TestSchemas:
    @pytest.mark.parametrize("file", sorted(KUBERAY.glob("*.yaml")), ids=lambda path: path.stem)
    def test_an_api_server_would_take_it(self, file: Path) -> None:
        assert [problem for tree in objects(file) for problem in problems(tree)] == []

    @pytest.mark.parametrize(
        ("name", "path", "value"),
        [
            # a misspelt key, at every depth and in every schema
            ("raycluster", "spec.enableInTreeAutoscalling", True),
            ("raycluster", "spec.authOptions.modus", "token"),
            ("raycluster", "spec.workerGroupSpecs.0.maxReplica", 2),
            ("raycluster", "spec.headGroupSpec.template.spec.terminationGracePeriod", 9),
            ("rayjob", "spec.ttlSecondsAfterFinish", 9),
            ("rayjob", "spec.submitterPodTemplate.spec.containers.0.securityContext.privilege", False),
            ("rayjob", "spec.rayClusterSpec.workerGroupSpecs.0.template.spec.volumes.1.emptyDir.size", "1Gi"),
            ("storage", "spec.accessMode", ["ReadWriteMany"]),
            ("policies", "spec.egres", []),
            ("monitoring", "spec.podMetricsEndpoints.0.ports", "metrics"),
            # a wrong type or value
            ("raycluster", "spec.authOptions.mode", "tokens"),
            ("raycluster", "spec.headGroupSpec.rayStartParams.num-cpus", 0),
            ("raycluster", "spec.workerGroupSpecs.0.replicas", "2"),
            ("raycluster-elastic", "spec.autoscalerOptions.version", "v3"),
            ("raycluster", "spec.headGroupSpec.template.spec.containers.0.env.0.value", 90),
            ("rayjob", "spec.backoffLimit", -1),
            ("rayjob", "spec.shutdownAfterJobFinishes", "true"),
            ("rayjob", "spec.rayClusterSpec.headGroupSpec.template.spec.terminationGracePeriodSeconds", "2m"),
            ("policies", "spec.podSelector", ["app"]),
            ("monitoring", "spec.podMetricsEndpoints.0.interval", "15 seconds"),
        ],
    )
    def test_what_is_wrong_is_refused(self, name: str, path: str, value: object) -> None:
        tree = objects(KUBERAY / f"{name}.yaml")[0]
        *parents, last = path.split(".")
        place: Any = tree
        for key in parents:
            place = place[int(key)] if isinstance(place, list) else place[key]
        place[last] = value
        (problem,) = problems(tree)
        assert last in problem

    def test_what_is_missing_is_missed(self) -> None:
        tree = one("raycluster")
        del tree["spec"]["workerGroupSpecs"][0]["groupName"]
        del tree["spec"]["headGroupSpec"]["template"]["spec"]["containers"]
        assert len(problems(tree)) == 2


class TestAlike:
    def test_elastic_differs_from_fixed_only_where_it_must(self) -> None:
        group, head = "workerGroupSpecs.0", "headGroupSpec.template.spec"
        wanted = {
            "enableInTreeAutoscaling",
            "autoscalerOptions",
            f"{group}.maxReplicas",
            f"{group}.template.spec.restartPolicy",  # what the autoscaler asks for
            f"{head}.restartPolicy",
            f"{head}.automountServiceAccountToken",  # it talks to the API server from the head
        }
        for kind in ("raycluster", "rayjob"):
            fixed, elastic = one(kind), one(f"{kind}-elastic")
            assert differences(cluster_of(fixed), cluster_of(elastic)) == wanted
        assert differences(one("rayjob")["spec"], one("rayjob-elastic")["spec"]) == {
            "entrypoint",
            *(f"rayClusterSpec.{path}" for path in wanted),
        }

    @pytest.mark.parametrize("suffix", ["", "-elastic"])
    def test_a_jobs_cluster_is_the_standing_one_with_a_configuration(self, suffix: str) -> None:
        job, standing = cluster_of(one(f"rayjob{suffix}")), cluster_of(one(f"raycluster{suffix}"))
        pod = job["headGroupSpec"]["template"]["spec"]
        (config,) = [v for v in pod["volumes"] if "configMap" in v]
        (mount,) = [m for m in pod["containers"][0]["volumeMounts"] if m["name"] == config["name"]]
        assert mount["readOnly"]
        assert f"--config {mount['mountPath']}/" in one(f"rayjob{suffix}")["spec"]["entrypoint"]
        pod["volumes"].remove(config)
        pod["containers"][0]["volumeMounts"].remove(mount)
        assert job == standing

    def test_elastic_workers_are_what_the_autoscaler_may_start(self) -> None:
        config = load_config(ROOT / "launch" / "jobs" / "cluster.yaml")
        (group,) = cluster_of(one("rayjob"))["workerGroupSpecs"]
        counts = [group[key] for key in ("replicas", "minReplicas", "maxReplicas")]
        assert counts == [config.compute.num_workers] * 3
        override = one("rayjob-elastic")["spec"]["entrypoint"].partition("--set ")[2]
        elastic = load_config(ROOT / "launch" / "jobs" / "cluster.yaml", overrides=(override,))
        (group,) = cluster_of(one("rayjob-elastic"))["workerGroupSpecs"]
        assert elastic.compute.num_workers == (group["minReplicas"], group["maxReplicas"])
        assert group["replicas"] == elastic.compute.min_workers < elastic.compute.max_workers
        assert one("rayjob-elastic")["spec"]["rayClusterSpec"]["autoscalerOptions"]["version"] == "v2"


@pytest.mark.parametrize("name", CLUSTERS)
class TestClusters:
    def test_versions_are_those_of_the_project(self, name: str) -> None:
        assert cluster_of(one(name))["rayVersion"] == pins()["ray"]
        assert {c["image"] for c in containers(one(name))} == {f"REGISTRY/qbrec:{qbrec.__version__}"}

    def test_strangers_are_kept_out(self, name: str) -> None:
        assert cluster_of(one(name))["authOptions"] == {"mode": "token"}

    def test_the_head_takes_no_work(self, name: str) -> None:
        assert cluster_of(one(name))["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}

    def test_a_pod_may_do_no_more_than_the_restricted_standard_allows(self, name: str) -> None:
        for role, template in pod_templates(one(name)).items():
            pod = template["spec"]
            assert pod["securityContext"]["runAsNonRoot"]
            assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
            assert {key for v in pod.get("volumes", ()) for key in v} <= {
                "name", "persistentVolumeClaim", "emptyDir", "configMap",
            }  # fmt: skip
            confined = [c["securityContext"] for c in pod["containers"]]
            confined += [o["securityContext"] for o in [cluster_of(one(name)).get("autoscalerOptions")] if o]
            for context in confined:
                assert context == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
            # Of all pods only the autoscaler's has business with the API server.
            scales = role == "head" and name.endswith("elastic")
            assert pod.get("automountServiceAccountToken", True) is scales

    def test_the_user_is_the_images(self, name: str) -> None:
        identity = (ROOT / "cluster" / "Dockerfile").read_text().partition("USER ")[2].split()[0]
        for template in pod_templates(one(name)).values():
            context = template["spec"]["securityContext"]
            assert f"{context['runAsUser']}:{context['runAsGroup']}" == identity

    def test_requests_are_limits(self, name: str) -> None:
        resources = [c["resources"] for c in containers(one(name))]
        resources += [o["resources"] for o in [cluster_of(one(name)).get("autoscalerOptions")] if o]
        for given in resources:
            assert given["requests"] == given["limits"]
            assert {"cpu", "memory"} <= set(given["limits"])

    def test_shared_memory_and_storage_are_mounted(self, name: str) -> None:
        (claim,) = objects(KUBERAY / "storage.yaml")
        for role, template in pod_templates(one(name)).items():
            if role == "submitter":
                continue
            pod = template["spec"]
            volumes = {volume["name"]: volume for volume in pod["volumes"]}
            (container,) = pod["containers"]
            places = {m["mountPath"]: volumes[m["name"]] for m in container["volumeMounts"]}
            assert set(volumes) == {m["name"] for m in container["volumeMounts"]}
            shared = places["/dev/shm"]["emptyDir"]
            assert shared["medium"] == "Memory"
            # Ray gives 30 % of the memory to its object store, and leaves /dev/shm where that does not fit.
            memory = container["resources"]["limits"]["memory"]
            assert 0.3 * gibibytes(memory) < gibibytes(shared["sizeLimit"]) < gibibytes(memory)
            claimed = places["/mnt/qbrec"]["persistentVolumeClaim"]["claimName"]
            assert claimed == claim["metadata"]["name"]

    def test_a_pod_that_is_taken_away_has_time_for_its_checkpoint(self, name: str) -> None:
        """The driver's patience < Ray's drain < the kubelet's."""
        for role, template in pod_templates(one(name)).items():
            if role != "submitter":
                pod = template["spec"]
                env = {e["name"]: e["value"] for e in pod["containers"][0]["env"]}
                drain = float(env["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
                assert ComputeConfig().stop_grace_s < drain < pod["terminationGracePeriodSeconds"]

    def test_policies_and_monitors_find_its_pods(self, name: str) -> None:
        network, budget = objects(KUBERAY / "policies.yaml")
        (monitor,) = objects(KUBERAY / "monitoring.yaml")
        (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
        for role, template in pod_templates(one(name)).items():
            labels = template["metadata"]["labels"]
            assert network["spec"]["podSelector"]["matchLabels"].items() <= labels.items()
            assert monitor["spec"]["selector"]["matchLabels"].items() <= labels.items()
            by_operator = {"ray.io/node-type": role}
            head = budget["spec"]["selector"]["matchLabels"].items() <= (labels | by_operator).items()
            assert head is (role == "head")
            for container in template["spec"]["containers"] if role != "submitter" else ():
                ports = {p["name"]: p["containerPort"] for p in container["ports"]}
                assert ports[endpoint["port"]] == 8080


@pytest.mark.parametrize("name", JOBS)
class TestJobs:
    def test_a_new_try_is_the_same_run(self, name: str) -> None:
        spec = one(name)["spec"]
        assert spec["backoffLimit"] > 0
        assert spec["entrypoint"].startswith("python -m qbrec run --config ")
        assert "--resume" not in spec["entrypoint"]
        assert "run." not in spec["entrypoint"]

    def test_nothing_is_left_running(self, name: str) -> None:
        spec = one(name)["spec"]
        assert spec["shutdownAfterJobFinishes"]
        assert spec["ttlSecondsAfterFinished"] > 0

    def test_its_environment_is_that_of_submitted_jobs(self, name: str) -> None:
        mine = yaml.safe_load(one(name)["spec"]["runtimeEnvYAML"])
        assert mine == yaml.safe_load((ROOT / "launch" / "runtime_env.yaml").read_text())


class TestNetwork:
    def test_who_may_come_in(self) -> None:
        network = objects(KUBERAY / "policies.yaml")[0]["spec"]
        own = network["podSelector"]
        assert set(network["policyTypes"]) == {"Ingress", "Egress"}
        open_to: dict[object, list[dict[str, Any]]] = {}
        for rule in network["ingress"]:
            for port in rule.get("ports", [{"port": "any"}]):
                open_to.setdefault(port["port"], []).extend(rule["from"])
        assert set(open_to) == {"any", 8265, 8080}
        assert open_to["any"] == [{"podSelector": own}]  # and with it the GCS
        elsewhere = [peer for peer in open_to[8265] if "namespaceSelector" in peer]
        assert [peer["podSelector"]["matchLabels"] for peer in elsewhere] == [
            {"app.kubernetes.io/name": "kuberay-operator"}
        ]
        assert not any("ipBlock" in peer for rule in network["ingress"] for peer in rule["from"])

    def test_where_to_they_may_go(self) -> None:
        network = objects(KUBERAY / "policies.yaml")[0]["spec"]
        rules = network["egress"]
        assert all(rule.get("to") for rule in rules), "a rule without `to` allows everything"
        (world,) = [rule for rule in rules if any("0.0.0.0/0" in str(peer) for peer in rule["to"])]
        assert world["to"] == [{"ipBlock": {"cidr": "0.0.0.0/0", "except": ["169.254.0.0/16"]}}]
        assert {port["port"] for port in world["ports"]} == {443, 6443}
        names = [port for rule in rules for port in rule.get("ports", ()) if port["port"] == 53]
        assert {port["protocol"] for port in names} == {"UDP", "TCP"}
