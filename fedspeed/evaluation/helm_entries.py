"""The run entries of HELM (crfm-helm) that FederatedScope-LLM evaluates: 90 entries of 16 scenarios."""

_MMLU_SUBJECTS = """
abstract_algebra anatomy college_chemistry computer_security econometrics global_facts jurisprudence
philosophy professional_medicine us_foreign_policy astronomy business_ethics clinical_knowledge
college_biology college_computer_science college_mathematics college_medicine college_physics
conceptual_physics electrical_engineering elementary_mathematics formal_logic high_school_biology
high_school_chemistry high_school_computer_science high_school_european_history high_school_geography
high_school_government_and_politics high_school_macroeconomics high_school_mathematics
high_school_microeconomics high_school_physics high_school_psychology high_school_statistics
high_school_us_history high_school_world_history human_aging human_sexuality international_law
logical_fallacies machine_learning management marketing medical_genetics miscellaneous moral_disputes
moral_scenarios nutrition prehistory professional_accounting professional_law professional_psychology
public_relations security_studies sociology virology world_religions
""".split()
_RAFT_SUBSETS = """
ade_corpus_v2 banking_77 neurips_impact_statement_risks one_stop_english overruling semiconductor_org_types
tweet_eval_hate twitter_complaints systematic_review_inclusion tai_safety_research terms_of_service
""".split()
_GROUPS = "all male female LGBTQ christian muslim other_religions black white".split()

# Scenario -> its entries without the model; HELM's own names and arguments.
SCENARIOS: dict[str, list[str]] = {
    "MMLU": [f"mmlu:subject={subject},data_augmentation=canonical" for subject in _MMLU_SUBJECTS],
    "BoolQ": ["boolq:data_augmentation=canonical"],
    "NarrativeQA": ["narrative_qa:data_augmentation=canonical"],
    "NaturalQuestions (closed book)": ["natural_qa:mode=closedbook,data_augmentation=canonical"],
    "NaturalQuestions (open book)": ["natural_qa:mode=openbook_longans,data_augmentation=canonical"],
    "QuAC": ["quac:data_augmentation=canonical"],
    "HellaSwag": [
        "commonsense:dataset=hellaswag,method=multiple_choice_separate_original,data_augmentation=canonical"
    ],
    "OpenBookQA": [
        "commonsense:dataset=openbookqa,method=multiple_choice_separate_calibrated,data_augmentation=canonical"
    ],
    "TruthfulQA": ["truthful_qa:task=mc_single,data_augmentation=canonical"],
    "MS MARCO (regular)": ["msmarco:data_augmentation=canonical,track=regular,valid_topk=30"],
    "MS MARCO (TREC)": ["msmarco:data_augmentation=canonical,track=trec,valid_topk=30"],
    "CNN/DailyMail": ["summarization_cnndm:temperature=0.3,device=cpu"],
    "XSum": ["summarization_xsum_sampled:temperature=0.3,device=cpu"],
    "IMDB": ["imdb:data_augmentation=canonical"],
    "CivilComments": [f"civil_comments:demographic={group},data_augmentation=canonical" for group in _GROUPS],
    "RAFT": [f"raft:subset={subset},data_augmentation=canonical" for subset in _RAFT_SUBSETS],
}


def run_entries(model: str) -> str:
    """Return the run entries for a model, in the HOCON form of `helm-run --conf-paths`."""
    lines = []
    for scenario, entries in SCENARIOS.items():
        lines.append(f"  # {scenario}")
        for entry in entries:
            name, arguments = entry.split(":")
            lines.append(f'  {{description: "{name}:model={model},{arguments}", priority: 1}}')
    return "\n".join(["entries: [", *lines, "]", ""])
