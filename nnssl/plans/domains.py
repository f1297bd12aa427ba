"""Domains: which scanner, site or modality the cases of a data set come from. Loads no torch.

``dataset.json`` holds them as ``nnssl.domains`` {case: domain} and ``nnssl.domain_modalities`` {domain: modality}.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from nnssl.errors import UserError, nearest
from nnssl.layout import IMAGE_FOLDERS, RawDataset

#: The entries of the block ``nnssl`` of dataset.json.
DOMAIN_KEYS = ("domains", "domain_modalities")
#: nnU-Net's channel name, in small letters, whose normalization takes statistics over the whole data set.
CT = "ct"
#: nnU-Net's channel name of a z-score of each case by itself.
Z_SCORED = "zscore"


@dataclass(frozen=True)
class Domains:
    """The domains of a data set; both fields are empty if it names none.

    Args:
        of_case: case -> domain.
        modalities: domain -> modality, such as CT or MR, for the domains whose modality is stated.
    """

    of_case: dict[str, str] = field(default_factory=dict)
    modalities: dict[str, str] = field(default_factory=dict)

    @classmethod
    def from_json(cls, dataset_json: Mapping) -> Domains:
        """Read the block ``nnssl`` of a dataset.json.

        Raises:
            UserError: if an entry does not map names to names.
        """
        block = dataset_json.get("nnssl", {})
        found = {}
        for key in DOMAIN_KEYS:
            found[key] = block.get(key, {})
            if not isinstance(found[key], dict) or not all(isinstance(v, str) and v for v in found[key].values()):
                rule = f"nnssl.{key} of dataset.json maps names to names"
                raise UserError(rule, repr(found[key])[:100], '{"name": "name"}', "repair dataset.json")
        names = set(found["domains"].values())
        return cls(found["domains"], {d: m for d, m in found["domain_modalities"].items() if d in names})

    @classmethod
    def of(cls, dataset: RawDataset) -> Domains:
        """Read the domains of a raw data set.

        Raises:
            UserError: if the data set names domains, but not that of every case.
        """
        domains = cls.from_json(dataset.json)
        domains.require_all(case for folder in IMAGE_FOLDERS for case in dataset.cases(folder))
        return domains

    @property
    def names(self) -> list[str]:
        """The domains, sorted."""
        return sorted(set(self.of_case.values()))

    def require_all(self, cases: Iterable[str]) -> None:
        """Refuse a case without a domain where others have one: it might belong to a domain that must not be seen.

        Raises:
            UserError: naming the cases.
        """
        without = sorted(set(cases) - self.of_case.keys())
        if self.of_case and without:
            more = f" and {len(without) - 10} more" if len(without) > 10 else ""
            remedy = "add them to --domains or to nnssl.domains of dataset.json, for example as domain unknown"
            rule = "domains are given for every case or for none"
            raise UserError(rule, f"none for {', '.join(without[:10])}{more}", None, remedy)

    def require_known(self, option: str, names: Iterable[str]) -> None:
        """Refuse names that are no domain.

        Raises:
            UserError: with the nearest domains.
        """
        if not self.of_case:
            remedy = "import with --domains, or add nnssl.domains to its dataset.json"
            raise UserError(f"{option} needs a source whose cases have domains", "none", None, remedy)
        for name in names:
            if name not in self.names:
                raise UserError(f"{option} names domains of the source", repr(name), nearest(name, self.names))

    def restricted_to(self, cases: Iterable[str]) -> Domains:
        """Return the domains of some cases."""
        kept = set(cases)
        of_case = {case: domain for case, domain in self.of_case.items() if case in kept}
        return Domains(of_case, {d: m for d, m in self.modalities.items() if d in of_case.values()})

    def to_json(self) -> dict[str, dict[str, str]]:
        """Return the entries of the block ``nnssl``; empty ones are left out."""
        return {k: dict(v) for k, v in zip(DOMAIN_KEYS, (self.of_case, self.modalities), strict=True) if v}

    def described(self) -> str:
        """Return the domains with their modalities, where stated, as one line."""
        return ", ".join(f"{d} ({self.modalities[d]})" if d in self.modalities else d for d in self.names)

    def only_ct(self) -> bool:
        """Whether nothing but CT is in the data set: every domain is CT, or there is at most one and it is unstated."""
        stated = {self.modalities.get(name, "").casefold() for name in self.names}
        return stated <= {CT} or (len(self.names) == 1 and stated == {""})

    def mixed(self) -> bool:
        """Whether domains of different modalities are known to meet."""
        return len({m.casefold() for m in self.modalities.values()}) > 1


def channels_by_themselves(channel_names: Mapping[str, str], domains: Domains) -> tuple[dict[str, str], str | None]:
    """Apply the rule that every case is z-scored by itself where CT and other modalities meet.

    nnU-Net normalizes a channel named CT with the mean and spread of the whole data set. These mean nothing where
    grey levels have no common unit. So such a channel is called ``zscore`` unless every domain is CT.

    Args:
        channel_names: ``channel_names`` of a dataset.json.
        domains: the data set's domains.

    Returns:
        The channel names to plan with, and a line for the user if they changed.
    """
    if domains.only_ct() or not any(name.casefold() == CT for name in channel_names.values()):
        return dict(channel_names), None
    line = (
        f"channel CT is named {Z_SCORED}: every case is z-scored by itself, since not every domain is said to be CT: "
        f"{domains.described()}; the third column of --domains says so"
    )
    return {key: Z_SCORED if name.casefold() == CT else name for key, name in channel_names.items()}, line


def count_by_domain(dataset: RawDataset, domains: Domains) -> str:
    """Return the cases of each domain by role as one line, such as ``A: 4 labeled, 20 unlabeled; B: 24 test``."""
    roles = {"imagesTr": "labeled", "imagesUn": "unlabeled", "imagesVal": "val", "imagesTs": "test"}
    counts = dict.fromkeys(domains.names, "")
    for folder, role in roles.items():
        found = [domains.of_case[case] for case in dataset.cases(folder)]
        for name in set(found):
            counts[name] += (", " if counts[name] else "") + f"{found.count(name)} {role}"
    return "; ".join(f"{name}: {count or 'none'}" for name, count in counts.items())
