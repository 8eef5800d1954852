"""Published accuracies on BLiMP, in %."""

PHENOMENA = ("anaphor_agreement", "argument_structure", "binding", "control_raising", "determiner_noun_agreement",
             "ellipsis", "filler_gap_dependency", "irregular_forms", "island_effects", "npi_licensing", "quantifiers",
             "subject_verb_agreement")  # fmt: skip

PUBLISHED = {
    "5-gram": (61.2, 47.9, 71.9, 64.4, 68.5, 70.1, 36.9, 60.2, 79.5, 57.2, 45.5, 53.5, 60.3),
    "LSTM": (69.8, 91.7, 73.2, 73.5, 67.0, 85.4, 67.6, 73.9, 89.1, 46.6, 51.7, 64.5, 80.1),
    "Transformer-XL": (69.6, 94.1, 72.2, 74.7, 71.5, 83.0, 77.2, 66.6, 78.2, 48.3, 55.2, 69.3, 76.0),
    "GPT-2": (83.0, 99.3, 81.8, 80.9, 81.9, 95.8, 89.4, 81.3, 91.9, 72.7, 76.8, 79.0, 86.4),
    "RoBERTa-base, 10M words": (69.5, 81.5, 67.1, 67.3, 67.9, 90.8, 76.4, 63.5, 87.4, 39.9, 55.9, 70.5, 65.4),
    "RoBERTa-large": (86.5,),
    "one human": (88.6,),
}
"""Overall and of each of PHENOMENA where known.

5-gram, LSTM, Transformer-XL and GPT-2 by their likelihood: raw_results/summary/models_summary.jsonl of
github.com/alexwarstadt/blimp. RoBERTa-base trained on the 10 million words of BabyLM's strict-small track: README.md
of github.com/babylm/evaluation-pipeline-2023, on pairs whose words occur in those; overall is the mean of the
phenomena. RoBERTa-large by pseudo-log-likelihood, and single people (what most of several say is right in 96.4 %):
examples/lingacc-blimp/README.md of github.com/awslabs/mlm-scoring, Warstadt et al. 2020.
"""

OF_PARADIGMS = ("5-gram", "LSTM", "Transformer-XL", "GPT-2")
PARADIGMS = {
    "adjunct_island": (47.9, 67.4, 64.5, 89.4),
    "anaphor_gender_agreement": (43.9, 88.2, 91.2, 99.4),
    "anaphor_number_agreement": (51.9, 95.2, 97.0, 99.2),
    "animate_subject_passive": (70.3, 71.5, 74.3, 76.6),
    "animate_subject_trans": (90.7, 86.8, 88.5, 84.9),
    "causative": (53.5, 68.4, 57.5, 78.2),
    "complex_NP_island": (49.7, 47.4, 57.5, 72.2),
    "coordinate_structure_constraint_complex_left_branch": (32.0, 30.1, 35.8, 81.0),
    "coordinate_structure_constraint_object_extraction": (59.3, 70.5, 74.4, 85.4),
    "determiner_noun_agreement_1": (88.3, 91.8, 91.7, 98.8),
    "determiner_noun_agreement_2": (86.3, 91.9, 81.1, 97.7),
    "determiner_noun_agreement_irregular_1": (85.4, 81.5, 88.3, 95.7),
    "determiner_noun_agreement_irregular_2": (90.4, 86.0, 81.6, 95.3),
    "determiner_noun_agreement_with_adj_2": (49.7, 86.2, 78.1, 94.9),
    "determiner_noun_agreement_with_adj_irregular_1": (53.0, 76.2, 80.8, 92.7),
    "determiner_noun_agreement_with_adj_irregular_2": (55.4, 82.9, 76.6, 94.0),
    "determiner_noun_agreement_with_adjective_1": (51.9, 86.7, 85.9, 97.5),
    "distractor_agreement_relational_noun": (23.5, 76.0, 77.2, 79.5),
    "distractor_agreement_relative_clause": (21.7, 62.7, 59.8, 65.7),
    "drop_argument": (71.6, 78.9, 70.3, 80.7),
    "ellipsis_n_bar_1": (23.4, 67.8, 65.1, 91.5),
    "ellipsis_n_bar_2": (50.4, 67.4, 89.2, 87.2),
    "existential_there_object_raising": (83.5, 65.9, 75.9, 78.4),
    "existential_there_quantifiers_1": (90.5, 96.3, 93.7, 99.5),
    "existential_there_quantifiers_2": (62.3, 16.2, 14.0, 42.4),
    "existential_there_subject_raising": (77.4, 79.5, 78.7, 91.1),
    "expletive_it_object_raising": (71.5, 63.0, 71.5, 79.2),
    "inchoative": (50.9, 65.3, 54.3, 65.9),
    "intransitive": (67.8, 78.5, 67.2, 84.2),
    "irregular_past_participle_adjectives": (79.4, 92.8, 90.5, 97.7),
    "irregular_past_participle_verbs": (79.6, 85.3, 65.8, 86.1),
    "irregular_plural_subject_verb_agreement_1": (72.6, 81.1, 77.6, 92.8),
    "irregular_plural_subject_verb_agreement_2": (87.6, 89.1, 82.7, 92.4),
    "left_branch_island_echo_question": (95.8, 31.6, 63.0, 52.3),
    "left_branch_island_simple_question": (56.5, 36.1, 35.5, 87.1),
    "matrix_question_npi_licensor_present": (1.2, 1.6, 0.7, 65.4),
    "npi_present_1": (46.8, 53.6, 60.5, 64.8),
    "npi_present_2": (46.9, 53.9, 48.2, 64.3),
    "only_npi_licensor_present": (56.6, 92.9, 79.8, 94.5),
    "only_npi_scope": (29.8, 36.4, 45.3, 78.5),
    "passive_1": (89.2, 71.9, 80.6, 89.3),
    "passive_2": (82.2, 72.5, 80.9, 90.2),
    "principle_A_c_command": (57.8, 58.8, 60.8, 73.7),
    "principle_A_case_1": (100.0, 100.0, 100.0, 100.0),
    "principle_A_case_2": (48.9, 87.3, 95.3, 94.8),
    "principle_A_domain_1": (95.2, 98.3, 99.1, 98.4),
    "principle_A_domain_2": (56.4, 68.3, 69.7, 77.5),
    "principle_A_domain_3": (52.2, 55.2, 60.0, 75.4),
    "principle_A_reconstruction": (40.4, 46.4, 37.9, 46.8),
    "regular_plural_subject_verb_agreement_1": (75.5, 89.0, 73.1, 96.7),
    "regular_plural_subject_verb_agreement_2": (80.9, 82.5, 85.3, 91.0),
    "sentential_negation_npi_licensor_present": (92.7, 100.0, 98.8, 97.1),
    "sentential_negation_npi_scope": (44.7, 23.2, 53.3, 73.2),
    "sentential_subject_island": (60.5, 42.8, 36.5, 35.5),
    "superlative_quantifiers_1": (44.7, 62.8, 84.3, 87.0),
    "superlative_quantifiers_2": (16.5, 82.6, 85.2, 87.2),
    "tough_vs_raising_1": (32.6, 33.6, 45.2, 72.0),
    "tough_vs_raising_2": (77.4, 93.0, 86.1, 88.9),
    "transitive": (70.8, 64.7, 75.8, 86.0),
    "wh_island": (56.2, 46.7, 19.5, 78.9),
    "wh_questions_object_gap": (52.7, 79.4, 60.7, 84.2),
    "wh_questions_subject_gap": (82.0, 91.5, 82.5, 95.6),
    "wh_questions_subject_gap_long_distance": (85.6, 95.6, 86.2, 87.1),
    "wh_vs_that_no_gap": (82.5, 96.9, 86.4, 96.8),
    "wh_vs_that_no_gap_long_distance": (81.0, 97.3, 91.2, 93.8),
    "wh_vs_that_with_gap": (17.6, 42.8, 42.0, 55.1),
    "wh_vs_that_with_gap_long_distance": (20.0, 13.7, 17.2, 56.3),
}
"""Of each paradigm those of OF_PARADIGMS; from the same file as theirs above."""
