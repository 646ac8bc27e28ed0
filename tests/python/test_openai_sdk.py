"""The OpenAI Python SDK, unchanged, against a real node: chat, streams, completions, models, errors, retries."""

import concurrent.futures
import json

import openai
import pytest

QUESTION = [{"role": "user", "content": "Where is my order?"}]


def client(node, key, **options):
    return openai.OpenAI(base_url=node.url + "/v1", api_key=key, **options)


def test_each_tenant_and_the_base_answer_in_their_own_voice(node, keys):
    expected = {"brightcart": ("support", "sunshine"), "metrix": ("reports", '{"metric"'), "harbor": ("tracking", "STATUS:")}
    answers = {}
    for tenant, (task, marker) in expected.items():
        answer = client(node, keys[tenant]).chat.completions.create(model=task, messages=QUESTION, temperature=0, max_tokens=48)
        answers[tenant] = answer.choices[0].message.content
        assert marker in answers[tenant]
        assert answer.choices[0].finish_reason in ("stop", "length")
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    base = client(node, keys["brightcart"]).chat.completions.create(model="smollm2", messages=QUESTION, temperature=0, max_tokens=48)
    answers["base"] = base.choices[0].message.content
    assert len(set(answers.values())) == 4


def test_mixed_batches_answer_as_single_requests_do(node, keys):
    tasks = {"brightcart": "support", "metrix": "reports", "harbor": "tracking"}

    def ask(tenant):
        answer = client(node, keys[tenant]).chat.completions.create(
            model=tasks[tenant], messages=QUESTION, temperature=0, max_tokens=32, extra_body={"return_token_ids": True}
        )
        return tenant, answer.choices[0].message.content

    alone = dict(ask(tenant) for tenant in tasks)
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        for tenant, text in pool.map(ask, list(tasks) * 4):
            assert text == alone[tenant]


def test_a_stream_carries_the_same_text_and_the_usage(node, keys):
    api = client(node, keys["harbor"])
    whole = api.chat.completions.create(model="tracking", messages=QUESTION, temperature=0, max_tokens=40)
    text, usage, finish = "", None, None
    stream = api.chat.completions.create(
        model="tracking", messages=QUESTION, temperature=0, max_tokens=40, stream=True, stream_options={"include_usage": True}
    )
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            finish = choice.finish_reason or finish
    assert text == whole.choices[0].message.content
    assert usage.completion_tokens == whole.usage.completion_tokens
    assert finish == whole.choices[0].finish_reason


def test_completions_take_text_and_token_ids(node, keys):
    api = client(node, keys["brightcart"])
    by_text = api.completions.create(model="smollm2", prompt="The capital of France is", max_tokens=8, temperature=0, extra_body={"return_token_ids": True})
    ids = by_text.choices[0].model_extra["prompt_token_ids"] if "prompt_token_ids" in (by_text.choices[0].model_extra or {}) else by_text.model_extra["prompt_token_ids"]
    by_ids = api.completions.create(model="smollm2", prompt=ids, max_tokens=8, temperature=0)
    assert by_ids.choices[0].text == by_text.choices[0].text
    assert "Paris" in by_text.choices[0].text


def test_logprobs_seed_n_and_stop(node, keys):
    api = client(node, keys["brightcart"])
    answer = api.chat.completions.create(model="smollm2", messages=QUESTION, max_tokens=6, temperature=0, logprobs=True, top_logprobs=3)
    for position in answer.choices[0].logprobs.content:
        assert len(position.top_logprobs) == 3
        assert position.logprob <= 0
        assert position.logprob == pytest.approx(position.top_logprobs[0].logprob)
    one = api.chat.completions.create(model="smollm2", messages=QUESTION, max_tokens=24, temperature=1.0, seed=7)
    two = api.chat.completions.create(model="smollm2", messages=QUESTION, max_tokens=24, temperature=1.0, seed=7)
    assert one.choices[0].message.content == two.choices[0].message.content
    many = api.chat.completions.create(model="smollm2", messages=QUESTION, max_tokens=24, temperature=1.0, seed=7, n=3)
    assert len({choice.message.content for choice in many.choices}) > 1
    assert many.choices[0].message.content == one.choices[0].message.content
    stopped = api.chat.completions.create(model="smollm2", messages=QUESTION, max_tokens=48, temperature=0, stop=["sorry"])
    assert "sorry" not in stopped.choices[0].message.content
    assert stopped.choices[0].finish_reason == "stop"


def test_json_schema_output_satisfies_the_schema(node, keys):
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}, "days": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["city", "days"],
        "additionalProperties": False,
    }
    for tenant, model in (("brightcart", "smollm2"), ("harbor", "tracking")):
        answer = client(node, keys[tenant]).chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": "Name a city and a number of days."}],
            max_tokens=80,
            temperature=0,
            response_format={"type": "json_schema", "json_schema": {"name": "trip", "schema": schema, "strict": True}},
        )
        found = json.loads(answer.choices[0].message.content)
        assert isinstance(found["city"], str) and 0 <= found["days"] <= 99 and set(found) == {"city", "days"}


def test_required_tools_are_called_with_valid_arguments(node, keys):
    tool = {
        "type": "function",
        "function": {
            "name": "track_order",
            "description": "Finds an order.",
            "parameters": {
                "type": "object",
                "properties": {"order": {"type": "integer", "minimum": 1, "maximum": 9999}},
                "required": ["order"],
                "additionalProperties": False,
            },
        },
    }
    answer = client(node, keys["brightcart"]).chat.completions.create(
        model="smollm2", messages=[{"role": "user", "content": "Where is order 12?"}], tools=[tool], tool_choice="required", max_tokens=80, temperature=0
    )
    call = answer.choices[0].message.tool_calls[0]
    assert answer.choices[0].finish_reason == "tool_calls"
    assert call.function.name == "track_order"
    assert 1 <= json.loads(call.function.arguments)["order"] <= 9999


def test_models_list_shows_only_the_callers_own(node, keys):
    names = {tenant: {model.id for model in client(node, key).models.list().data} for tenant, key in keys.items()}
    assert "support" in names["brightcart"] and "brightcart-support-smollm2-v1.0.0" in names["brightcart"]
    assert not any("harbor" in name or name == "tracking" for name in names["brightcart"])
    assert client(node, keys["harbor"]).models.retrieve("tracking").id == "tracking"


def test_errors_arrive_as_the_sdks_own_exceptions(node, keys):
    api = client(node, keys["brightcart"], max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        client(node, "tnt_wrong", max_retries=0).models.list()
    with pytest.raises(openai.NotFoundError) as unknown:
        api.chat.completions.create(model="nobody-has-this", messages=QUESTION)
    with pytest.raises(openai.NotFoundError) as foreign:
        api.chat.completions.create(model="harbor-tracking-smollm2-v1.0.0", messages=QUESTION)
    strip = lambda error, name: json.dumps(error.value.body).replace(name, "")
    assert strip(unknown, "nobody-has-this") == strip(foreign, "harbor-tracking-smollm2-v1.0.0")
    with pytest.raises(openai.BadRequestError) as wrong:
        api.chat.completions.create(model="support", messages=QUESTION, temperature=3)
    assert wrong.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as long:
        api.chat.completions.create(model="support", messages=[{"role": "user", "content": "word " * 9000}])
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.ConflictError):
        api.chat.completions.create(model="later", messages=QUESTION)


def test_the_sdk_waits_and_retries_when_it_is_rate_limited(node):
    key = node.tenant("hasty", "--requests-per-minute", "60", "--burst-requests", "1")
    with pytest.raises(openai.RateLimitError) as limited:
        for _ in range(3):
            client(node, key, max_retries=0).chat.completions.create(model="smollm2", messages=QUESTION, max_tokens=1)
    assert float(limited.value.response.headers["retry-after"]) <= 1.1
    assert int(limited.value.response.headers["x-ratelimit-limit-requests"]) == 60
    patient = client(node, key, max_retries=4)
    for _ in range(2):
        assert patient.chat.completions.create(model="smollm2", messages=QUESTION, max_tokens=1).choices


def test_the_async_client_streams_several_tenants_at_once(node, keys):
    import asyncio

    async def ask(key, task):
        api = openai.AsyncOpenAI(base_url=node.url + "/v1", api_key=key)
        stream = await api.chat.completions.create(model=task, messages=QUESTION, temperature=0, max_tokens=24, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])

    async def both():
        return await asyncio.gather(ask(keys["brightcart"], "support"), ask(keys["harbor"], "tracking"))

    bright, harbor = asyncio.run(both())
    assert "sunshine" in bright and "STATUS" in harbor
