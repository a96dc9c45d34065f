"""The Unicode group of an emoji, one of ten: "Smileys & Emotion", "Animals & Nature" and so on."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

# In the order of Unicode's own file. "Component" holds patches of skin and hair, which are drawn like emoji.
GROUPS = {
    "s": "Smileys & Emotion",
    "p": "People & Body",
    "c": "Component",
    "n": "Animals & Nature",
    "f": "Food & Drink",
    "t": "Travel & Places",
    "a": "Activities",
    "o": "Objects",
    "y": "Symbols",
    "g": "Flags",
}

# No package on which mmvit depends has the groups. This table is derived from emoji-test.txt of Unicode 15.0, by the
# first code point of an emoji: each entry (code point, hexadecimal, and the letter above) begins a range of a group,
# which ends where the next one begins. Other or newer code points in between belong to the group before them.
_BEGINS = (
    "23y 231At 2328o 23CFy 23F0t 23F8y 2600t 260Eo 2611y 2614t 2615f 2618n 261Dp 2620s 2622y 2639s 2640y 265Fa 2668t "
    "267By 2692o 2693t 2694o 2695y 2696o 269By 26A1t 26A7y 26B0o 26BDa 26C4t 26CEy 26CFo 26D4y 26E9t 26F3a 26F4t "
    "26F7p 26F8a 26F9p 26FAt 2702o 2705y 2708t 2709o 270Ap 270Fo 2714y 2728a 2733y 2744t 2747y 2763s 2795y 2B50t "
    "2B55y 1F004a 1F170y 1F1E6g 1F201y 1F300t 1F32Df 1F331n 1F336f 1F337n 1F33Df 1F33En 1F345f 1F380a 1F382f 1F383a "
    "1F385p 1F386a 1F38Cg 1F38Da 1F392o 1F396a 1F399o 1F39Fa 1F3A0t 1F3A3a 1F3A4o 1F3A6y 1F3A7o 1F3A8a 1F3A9o 1F3AAt "
    "1F3ABa 1F3ACo 1F3ADa 1F3B5o 1F3BDa 1F3C1g 1F3C2p 1F3C5a 1F3C7p 1F3C8a 1F3CAp 1F3CDt 1F3CFa 1F3D4t 1F3E7y 1F3E8t "
    "1F3EEo 1F3EFt 1F3F3g 1F3F5n 1F3F7o 1F3F8a 1F3F9o 1F3FAf 1F3FBc 1F400n 1F440p 1F451o 1F463p 1F479s 1F47Cp 1F47Ds "
    "1F481p 1F484o 1F485p 1F488t 1F489o 1F48Bs 1F48Do 1F48Fp 1F490n 1F491p 1F492t 1F493s 1F4A0y 1F4A1o 1F4A2s 1F4A3o "
    "1F4A4s 1F4A7t 1F4A8s 1F4AAp 1F4ABs 1F4AEn 1F4AFs 1F4B0o 1F4B1y 1F4B3o 1F4BAt 1F4BBo 1F4DBy 1F4DCo 1F4F3y 1F4F7o "
    "1F500y 1F507o 1F518y 1F525t 1F526o 1F52Af 1F52Ba 1F52Co 1F52Ea 1F52Fy 1F54An 1F54Bt 1F54Ey 1F550t 1F56Fo 1F570t "
    "1F573s 1F574p 1F576o 1F577n 1F579a 1F57Ap 1F587o 1F590p 1F5A4s 1F5A5o 1F5BCa 1F5C2o 1F5E3p 1F5E8s 1F5F3o 1F5FAt "
    "1F5FFo 1F600s 1F645p 1F648s 1F64Bp 1F680t 1F6A3p 1F6A4t 1F6A9g 1F6AAo 1F6ABy 1F6ACo 1F6ADy 1F6B2t 1F6B3y 1F6B4p "
    "1F6B7y 1F6BDo 1F6BEy 1F6BFo 1F6C0p 1F6C1o 1F6C2y 1F6CBo 1F6CCp 1F6CDo 1F6CEt 1F6CFo 1F6D0y 1F6D1t 1F6D2o 1F6D5t "
    "1F6D7o 1F6DCy 1F6DDt 1F6E0o 1F6E2t 1F6F7a 1F6F8t 1F7E0y 1F90Cp 1F90Ds 1F90Fp 1F910s 1F918p 1F920s 1F926p 1F927s "
    "1F930p 1F93Fa 1F940n 1F941o 1F942f 1F945a 1F950f 1F970s 1F977p 1F978s 1F97Bo 1F980f 1F981n 1F990f 1F992n 1F99Ef "
    "1F99Fn 1F9AAf 1F9ABn 1F9AFo 1F9B0c 1F9B4p 1F9BAo 1F9BBp 1F9BCt 1F9BEp 1F9C0f 1F9CCp 1F9D0s 1F9D1p 1F9E1s 1F9E2o "
    "1F9E7a 1F9EAo 1F9EDt 1F9EEo 1F9F1t 1F9F2o 1F9F3t 1F9F4o 1F9F5a 1F9F7o 1F9F8a 1F9F9o 1FA75s 1FA78o 1FA80a 1FA82t "
    "1FA83o 1FA84a 1FA87o 1FA90t 1FA91o 1FAA1a 1FAA3o 1FAA8t 1FAA9a 1FAAAo 1FAAFy 1FAB0n 1FAB5t 1FAB6n 1FAC0p 1FACEn "
    "1FAD0f 1FAE0s 1FAE6p 1FAE7o 1FAE8s 1FAF0p"
)
_STARTS = [int(begin[:-1], 16) for begin in _BEGINS.split()]
_LETTERS = [begin[-1] for begin in _BEGINS.split()]
_EYE_IN_SPEECH_BUBBLE = (0x1F441, 0x200D, 0x1F5E8)  # the one emoji in another group than its first code point alone


def emoji_group(code_points: Sequence[int]) -> str:
    """Return the Unicode group of an emoji, a sequence of code points without U+FE0F."""
    if tuple(code_points) == _EYE_IN_SPEECH_BUBBLE:
        return GROUPS["s"]
    return GROUPS[_LETTERS[bisect_right(_STARTS, code_points[0]) - 1]]
