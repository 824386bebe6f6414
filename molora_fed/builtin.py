"""What the core itself registers, through the same hooks as every plugin."""

from molora_fed.hookspecs import Register
from molora_fed.plugins import hookimpl

_OWN = "own definition"


@hookimpl
def register_domains(register: Register) -> None:
    """Register the domains that every machine with this package has text for."""
    module = "molora_fed.corpus.builtin"
    register(
        "python",
        f"{module}:read_python",
        summary="Source of Python's standard library",
        source=_OWN,
    )
    register("cpp", f"{module}:read_cpp", summary="C++ headers shipped with torch", source=_OWN)
    register(
        "science", f"{module}:read_science", summary="Docstrings of scipy and numpy", source=_OWN
    )
    register(
        "readme",
        f"{module}:read_readme",
        summary="Long descriptions of installed distributions and Python's language reference",
        source=_OWN,
    )
    for code, language in (
        ("de", "German"),
        ("fr", "French"),
        ("es", "Spanish"),
        ("it", "Italian"),
        ("nl", "Dutch"),
        ("sv", "Swedish"),
        ("pl", "Polish"),
        ("ru", "Russian"),
        ("ja", "Japanese"),
        ("pt_BR", "Brazilian Portuguese"),
        ("pt", "Portuguese"),
        ("uk", "Ukrainian"),
        ("ro", "Romanian"),
        ("da", "Danish"),
        ("tr", "Turkish"),
        ("ko", "Korean"),
    ):
        register(
            f"man-{code.lower().replace('_', '-')}",
            f"molora_fed.corpus.manuals:pages.{code}",
            summary=f"Manual pages in {language}, where this machine has them",
            source=_OWN,
        )
    for name, attribute, summary in (
        ("library-concurrency", "read_concurrency", "Python's library for concurrent programs"),
        ("library-network", "read_network", "Python's library for networks and their formats"),
        ("library-tools", "read_tools", "Python's library for programs about programs"),
        ("headers-c10", "read_headers_of_c10", "C++ headers of torch's core library"),
        ("headers-python", "read_headers_of_python", "C headers of Python"),
        ("docstrings-matplotlib", "read_matplotlib", "Docstrings of matplotlib"),
        ("docstrings-networkx", "read_networkx", "Docstrings of networkx"),
        ("docstrings-ray", "read_ray", "Docstrings of Ray"),
        ("docstrings-sqlalchemy", "read_sqlalchemy", "Docstrings of SQLAlchemy"),
        ("docstrings-sympy", "read_sympy", "Docstrings of SymPy"),
        ("docstrings-torch", "read_torch", "Docstrings of torch"),
        ("docstrings-transformers", "read_transformers", "Docstrings of transformers"),
    ):
        register(name, f"molora_fed.corpus.builtin:{attribute}", summary=summary, source=_OWN)


@hookimpl
def register_adapter_kinds(register: Register) -> None:
    """Register the kinds of adapter a contributor can train."""
    module = "molora_fed.adapters.kinds"
    register(
        "lora",
        f"{module}:LoraKind",
        summary="Low-rank factors trained directly on all linear layers (PEFT, rsLoRA)",
        source="arXiv 2106.09685, arXiv 2312.03732",
    )
    register(
        "svd",
        f"{module}:SvdKind",
        summary="Linear layers trained fully, shipped as the truncated SVD of the difference",
        source=_OWN,
    )
    register(
        "delta",
        f"{module}:DeltaKind",
        summary="Linear layers trained fully, shipped as the difference",
        source=_OWN,
    )


@hookimpl
def register_merges(register: Register) -> None:
    """Register the merge that every fusion is compared with."""
    register(
        "average",
        "molora_fed.adapters.updates:merge_average",
        summary="Mean of the weight differences B@A, equal weights",
        source="arXiv 2203.05482, on B@A",
    )


@hookimpl
def register_admission_checks(register: Register) -> None:
    """Register the checks every contribution passes before it is admitted."""
    module = "molora_fed.contributions.checks"
    for name, attribute, summary in (
        ("signature", "check_signature", "Signed by its contributor"),
        ("charter-identity", "check_charter_identity", "Signed for this cooperative"),
        ("required-samples", "check_required_samples", "Brought the samples that are asked for"),
        ("base-fingerprint", "check_base_fingerprint", "Trained on this base and tokenizer"),
        ("carried-files", "check_carried_files", "Carries the files that are asked for"),
        ("tensor-layout", "check_tensor_layout", "Tensor names, shapes and dtypes fit the base"),
        ("adapter-limits", "check_adapter_limits", "Kind, rank and bytes within the charter"),
        ("finite-values", "check_finite_values", "No NaN or infinity in any tensor"),
        ("own-domain-loss", "check_own_domain_loss", "Better than the base where it trained"),
        ("claimed-base", "check_claimed_base", "Clearly better, where only its shapes fit"),
        ("quantised-base", "check_quantised_base", "Says if it was trained on four bits"),
    ):
        register(name, f"{module}:{attribute}", summary=summary, source=_OWN)
    module = "molora_fed.contributions.comparison"
    for name, attribute, summary in (
        ("near-copy", "check_near_copy", "No admitted adapter under another key"),
        ("other-domains", "check_other_domains", "Finite and bounded on the text of others"),
    ):
        register(name, f"{module}:{attribute}", summary=summary, source=_OWN)
    module = "molora_fed.contributions.checks"
    for name, attribute, summary in (
        ("frozen-depth", "check_frozen_depth", "Frozen tensors bit-identical to the base"),
        (
            "shared-initialisation",
            "check_shared_initialisation",
            "Training started from the base, by the loss it states",
        ),
    ):
        register(name, f"{module}:{attribute}", summary=summary, source="arXiv 2603.22755")
