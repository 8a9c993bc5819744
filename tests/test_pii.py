from collections import Counter

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from aisle.preprocess.clean import prepare
from aisle.preprocess.pii import scrub

from .conftest import assert_linear


@pytest.mark.parametrize(
    ("text", "scrubbed"),
    [
        ("不相信的打我手机13800138000,大连的", "不相信的打我手机电话,大连的"),
        ("138 0013 8000或139-0013-9000", "电话或电话"),
        ("tel:+86 13800138000", "tel:电话"),
        ("8613800138000微信同号", "电话微信同号"),
        ("13800138000", "电话"),
        ("客服010-88210766没人接", "客服电话没人接"),
        ("(0755)2399 8877转802", "电话"),
        ("+86-21-58881234", "电话"),
        ("身份证11010519491231002X。", "身份证证件。"),
        ("发邮件到bj.xtt+1@mail.sohu.com.cn可以了解", "发邮件到邮箱可以了解"),
        ("a@b.co-x@y.com", "邮箱"),
        ("加QQ:383161223(注明)", "加QQ:账号(注明)"),
        ("果冻qq396276755", "果冻qq账号"),
        ("QQ群号是 673946022", "QQ群号是 账号"),
        ("微信:zhangsan_shop", "微信:账号"),
        ("微信号 zhang-san88好友", "微信号 账号好友"),
        ("wechat id: abcdef", "wechat id: 账号"),
        ("加vx:ab12345", "加vx:账号"),
        ("寄到浙江省杭州市西湖区文三路123号5栋2单元301室,谢谢", "寄到地址,谢谢"),
        ("北京市海淀区中关村南大街5号理工科技大厦1801室", "地址"),
        ("杭州文三路123号阳光公寓5号楼301室", "杭州地址"),
        ("上海市赤峰路100弄15号", "地址"),
    ],
)
def test_personal_data_is_replaced(text: str, scrubbed: str) -> None:
    assert scrub(text) == scrubbed


@pytest.mark.parametrize(
    "text",
    [
        "红富士苹果 5斤装 80mm 单果约210-260g",
        "移动电源13800mAh 13812345678mAh",
        "100%棉 A4纸 70g 500张*5包",
        "苹果 iPhone 13 128GB MNQQ2B/A",
        "ISBN 9787111054252 ISBN 978-7-111-05425-2",
        "SKU10023456789 货号6901234567892",
        "原价1599-200现价 ¥1399.00 满199-100",
        "2023-12-01 12:30 生产日期20231201 保质期20240530",
        "110105194912310021",  # not the checksum of an ID card
        "62220213912345678901",
        "0.13812345678",
        "客服400-820-8820 8008309909",
        "北京市 上海市老字号",
        "广东省广州市直供",
        "超市里3号买的 11月6号下的订单15号到货",
        "人民路3号下单,15号到",
        "还有登州路56号的青岛啤酒",
        "1号店 5号电池 7号球 3室2厅 12层不锈钢",
        "QQ糖 500g QQ音乐 2019款奇瑞QQ3",
        "微信小程序 WX-1234567",
        "好评@蒙牛乳业 @jing忘忧草 @@",
        "WD 4TB WD40EFRX 3.5in 6Gb/s 5400rpm 64MB",
        "intel xeon e3 1271v3 3.6ghz bx80646e31271v3",
    ],
)
def test_product_facts_are_kept(text: str) -> None:
    assert scrub(text) == text


PIECES = "138 0013 8000 13800138000 010- 88210766 11010519491231002X a@b.co -x@y.com @ . - : + ( ) QQ 微信 vx 号 id "
PIECES += "北京市 海淀区 中关村 大街 文三路 5号 3栋 301室 电话 地址 账号 好 x 1 8 转"


@given(st.lists(st.sampled_from([*PIECES.split(), " "])).map("".join) | st.text())
@example("a@b.co-x@y.com")
def test_scrubbing_twice_changes_nothing(text: str) -> None:
    once = scrub(text)
    assert scrub(once) == once
    if text.isprintable() and text.strip() and "&" not in text and "<" not in text:
        assert prepare(prepare(text)) == prepare(text)


@given(st.integers(10**16, 10**17 - 1))
def test_check_digits_are_verified(number: int) -> None:
    digits = "110105" + "19900307" + str(number)[-3:]
    assert sum("证件" in scrub(digits + check) for check in "0123456789X") == 1


def test_replacements_are_counted() -> None:
    found: Counter[str] = Counter()
    scrub("13800138000,13900139000 a@b.com QQ12345678 海淀区中关村大街5号", found)
    assert found == {"phone": 2, "email": 1, "account": 1, "address": 1}


UNITS = [
    "1",
    "a",
    "a.",
    "a@",
    "@",
    "138 0013 ",
    "010-",
    "qq",
    "qq:1",
    "微信a",
    "vx:",
    "市",
    "北京市",
    "北京市路",
    "路5号",
    "5栋",
]


@pytest.mark.parametrize("unit", [*UNITS, "路5号a", "北京市路5号5栋", "13800138000-", "a@b.co-"])
def test_no_text_is_costly_to_scrub(unit: str) -> None:
    """Cost grows with length, not its square."""
    assert_linear(scrub, unit, "@")
