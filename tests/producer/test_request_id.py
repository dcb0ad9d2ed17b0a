from tokenmill.producer.request_id import check_request_id, new_request_id, request_id_for


def test_request_ids() -> None:
    first, second = new_request_id(), new_request_id(3)
    assert first.startswith("0.")
    assert second.startswith("3.")
    assert first[2:12] <= second[2:12]
    assert len({new_request_id() for _ in range(1000)}) == 1000
    assert request_id_for("row 1") == request_id_for("row 1") != request_id_for("row 2")
    assert check_request_id(request_id_for("any é key")) == request_id_for("any é key")
