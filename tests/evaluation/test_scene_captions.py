from sycoca.evaluation.scene_captions import named_objects, score_captions


def test_objects_are_read_from_a_caption_in_order():
    assert named_objects("a small red star left of a big cyan ring") == ["red star", "cyan ring"]


def test_a_caption_is_right_only_if_all_it_names_is_there():
    captions = ["a red star and a blue ring", "a red star", "a background", "a blue ring above a red star"]
    objects = [["red star", "blue ring"], ["red ring"], ["red star"], ["blue ring", "red ring"]]
    assert score_captions(captions, objects) == {"all_right": 25.0, "first_right": 50.0}
