from rlhf.rounds import key, label, of_key, schedule


def test_rounds_repeat_what_lies_between_the_model_and_the_evaluation():
    assert schedule(("sft", "sample", "rank", "reward", "ppo", "evaluate"), 2) == [
        ("sft", 0),
        *(("sample", 0), ("rank", 0), ("reward", 0), ("ppo", 0)),
        *(("sample", 1), ("rank", 1), ("reward", 1), ("ppo", 1)),
        ("evaluate", 0),
    ]


def test_one_round_is_the_stages_in_their_order():
    assert schedule(("ppo", "pretrain"), 1) == [("pretrain", 0), ("ppo", 0)]


def test_a_key_names_a_stage_and_its_round():
    assert [key("reward", 0), key("reward", 2)] == ["reward", "reward-2"]
    assert [of_key("reward"), of_key("reward-2")] == [("reward", 0), ("reward", 2)]
    assert [label("reward", 0), label("reward", 2)] == ["reward", "reward of round 3"]
