import pytest

from stablelm_jax import config as config_lib

HEADER = "from stablelm_jax.config import default_config\n\n"


def write(path, body):
    path.write_text(HEADER + body)
    return path


def failure(path):
    with pytest.raises(config_lib.ConfigError) as error:
        config_lib.load(path)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_the_text_after_the_colon_goes_to_get_config(tmp_path):
    body = "def get_config(text):\n    c = default_config()\n    c.name = text\n    return c\n"
    path = write(tmp_path / "a.py", body)
    assert config_lib.load(f"{path}:a=1,b:2").name == "a=1,b:2"


def test_text_that_the_file_does_not_take_is_refused(tmp_path):
    path = write(tmp_path / "a.py", "def get_config():\n    return default_config()\n")
    assert "takes no text after the colon" in failure(f"{path}:mine")


def test_a_missing_file_names_its_neighbours(tmp_path):
    write(tmp_path / "right.py", "")
    assert "holds: right.py" in failure(tmp_path / "wrong.py")
    assert "holds: no config file" in failure(tmp_path / "nowhere" / "wrong.py")


def test_a_mistyped_field_names_the_line_and_the_nearest_field(tmp_path):
    body = "def get_config():\n    c = default_config()\n    c.model.widht = 3\n    return c\n"
    message = failure(write(tmp_path / "a.py", body))
    assert "line 5: there is no field 'widht'; did you mean config.model.width?" in message


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("def get_config(:\n", "SyntaxError"),
        ("import no_such_module\n", "line 3: ModuleNotFoundError"),
        ("x = 1\n", "get_config"),
        ("def get_config():\n    c = default_config()\n    c.seed = 'a'\n", "line 5: TypeError"),
        ("def get_config():\n    open('/no/such/file')\n", "line 4: FileNotFoundError"),
        ("def get_config():\n    return default_config\n", "returns no config"),
        ("def get_config():\n    default_config()\n", "returns no config"),
        ("def get_config():\n    return type(default_config())()\n", "data"),
    ],
)
def test_whatever_goes_wrong_in_a_file_is_one_line(tmp_path, body, says):
    message = failure(write(tmp_path / "a.py", body))
    assert message.startswith(f"config file {tmp_path / 'a.py'}: ")
    assert says in message


def test_a_folder_is_no_config_file(tmp_path):
    assert "is no Python file" in failure(tmp_path)


def test_weights_are_read_from_text():
    assert config_lib.parse_weights("mine=0.7, other=3,third") == {
        "mine": 0.7,
        "other": 3.0,
        "third": 1.0,
    }
    assert config_lib.parse_weights("") == {}


@pytest.mark.parametrize("text", ["mine=", "mine=much", "Mine", "a,a=2", "a,,b", "a b", "a=1;b=2"])
def test_weights_that_cannot_be_read_say_how_to_write_them(text):
    with pytest.raises(config_lib.ConfigError, match="write them as mine=0.7,other=0.3"):
        config_lib.parse_weights(text)
