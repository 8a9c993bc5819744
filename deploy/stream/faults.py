"""What Kafka's errors mean to a user."""

from __future__ import annotations

import re

from confluent_kafka import KafkaError, KafkaException

from aisle.deploy.stream.settings import KafkaOptions
from aisle.errors import InputError, ServerError

# The user must do something; waiting does not help.
REMEDIES = {
    KafkaError.TOPIC_AUTHORIZATION_FAILED: "give {user} the rights to read {source}, and to write {target} and "
    "{dead_letters}",
    KafkaError.GROUP_AUTHORIZATION_FAILED: "give {user} the right to read the group {group}",
    KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED: "give {user} the rights to write and describe the transactional "
    "id {group}-{instance}",
    KafkaError.CLUSTER_AUTHORIZATION_FAILED: "give {user} the right of idempotent writes on the cluster",
    KafkaError.UNKNOWN_TOPIC_OR_PART: "create the topics {source}, {target} and {dead_letters}",
    KafkaError._UNKNOWN_TOPIC: "create the topics {source}, {target} and {dead_letters}",
    KafkaError.TOPIC_EXCEPTION: "give the name of a topic that exists",
    KafkaError.SASL_AUTHENTICATION_FAILED: "check the sasl.… lines of --config",
    KafkaError._AUTHENTICATION: "check the sasl.… and ssl.… lines of --config",
    KafkaError._SSL: "check the security.protocol and ssl.… lines of --config",
    KafkaError._UNSUPPORTED_FEATURE: "the stream needs a broker with transactions: Kafka 2.5 or later",
    KafkaError.MSG_SIZE_TOO_LARGE: "lower message.max.bytes in --config to that of the topics",
    KafkaError.INVALID_TRANSACTION_TIMEOUT: "lower transaction.timeout.ms in --config to the brokers' limit",
    KafkaError._INVALID_ARG: "correct it in --config",
}


def error_of(failure: KafkaException | KafkaError) -> KafkaError:
    """Return the error in an exception of the library."""
    error: KafkaError = failure.args[0] if isinstance(failure, KafkaException) else failure
    return error


def ended(error: KafkaError, options: KafkaOptions) -> Exception | None:
    """Return the exception of a consumer that the group no longer accepts; None if it is still a member."""
    if error.code() not in (KafkaError._FATAL, KafkaError.FENCED_INSTANCE_ID):
        return None
    if "fenced" not in error.str():
        return ServerError(f"{options.brokers}: {error.str()}")
    return ServerError(f"another worker has taken the name {options.instance}; give each its own --instance")


def remedied(error: KafkaError, options: KafkaOptions) -> Exception | None:
    """Return the exception that ends the stream with what to do; None if waiting can help."""
    remedy = REMEDIES.get(error.code())
    if remedy is None:
        return None
    user = options.properties.get("sasl.username", "this client")
    fields = {name: getattr(options, name) for name in ("source", "target", "dead_letters", "group", "instance")}
    return InputError(f"{options.brokers}: {_reason(error)}; {remedy.format(user=user, **fields)}")


def unreachable(error: KafkaError, last: KafkaError | None, options: KafkaOptions) -> Exception:
    """Return the exception for brokers that do not answer at the start.

    Args:
        last: the last error that the library told of a connection, which says why.
    """
    for each in (error, last):
        if each is not None and (known := remedied(each, options)):
            return known
    why = _reason(last or error)
    return InputError(f"no broker answers at {options.brokers} ({why}); check --brokers and the file of --config")


def _reason(error: KafkaError) -> str:
    """Return an error's own words, without where it arose in the library."""
    return re.split(r"(?:Broker|Local): ", error.str())[-1].rstrip(".")
