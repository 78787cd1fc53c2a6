"""Raw blocks in NumPy: what the formats without a layout of their own mean, 256 weights to a block.

The formats are ggml's (ggml-common.h, ggml-quants.c), each operation one of binary32 in the order of the format's own
package. It is the twin of csrc/ops/raw and shares nothing with it; `vai.attach` uses it as well.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

# ggml's codebooks (iq2xxs_grid and so on): points of 8 values out of 3, or of 4 out of 8. A point is a number in that
# base, its first value the lowest digit; every codebook ascends. The text has a bit for each possible number, base85.
_POINTS = {
    "IQ2_XXS": (
        "RTUIf5JW*i00b0701yBG00ck)6aYW~00004002-BKtT}z0Tcv4Py|2#5C8xL5C8yB0003106+i$K@<c)6chje1ONa8000C40000000a;K0000000"
        "00K1P~AaKmY_000aRL06;(h0RR91000350000001yN~1V8`)1ONa401yBG01yBG06+i`00000000001pxpA002M$000pH000000000100000KmY&"
        "$000yO000310R;d60000G5C8xG002+`0000000000KtTWi0YCr%002M$000C4KmY&$0000000000KmY(h00aO400004000000000000000000010"
        "000008kJ_K@boD6a)Ye06+i$00cw;06;(h06;(h0RR9%5C8!H000mG5C8xK5C8xG000000RR9100000000yO01yEH000001ONa401yEL00000000"
        "C4000C45JXS_000040RR92000C4000000RR9100000KmY&$00000002M%000310000000004000000RR9100a;O0000400000002M$00000000C4"
        "0000000000K>z>&0003106+i$002M$0000006+i$01yBG000pH000000000002BZK00004000000000000000000000RR9100000000000000000"
        "00000000002Ni000C406+i$00ck)1ONa4000001ONa40000002D+35CA{`00004000040000G000C4KmY&%0000$000000000000031000000000"
        "00096100000000C55Ci}K0000106+i$002M$0000000031000001OPw)0RR910000000001000000000000000000000000001yBG00001000000"
        "0000000000000000aO401yBG1ONa40RR910000000aO4000000000000aO400000000000000000000000000000000000000C4000001ONa4000"
        "0000000000000000000"
    ),
    "IQ2_XS": (
        "RaI3{RYgG+MFCV*RZvAi5Cs7MR8bH>K?DE+0RT`{ML`u60TcuPP(?ui1px#E002Ni01yQL06+i$Kve}16a)bf06;(m0RRL506-7`009650RR9101"
        "yFGRZ&nyK|loo08~*BKtTWi0Z;%?5dc5{0096108m9i07U^11ONa)K>z>&0000006+i)00031000001qA>EKmY&)000pH000001ONa400000KmY&"
        "$003205I{iy00965P!Iq>5C9MW000mG0096100aO4L_q*R0RR91002M$000CK0000G0096200000000m{0R#X50RRvH1ONa40000G009610T2KH0"
        "02Y*08mv$K~)726a)ZJML_@s0RTh*KtMqOKmh;%0000$6-5CQ1ON~K0RRO75Ci}K002M$0RaF&5C8xG000yO01yEI0RR911P}lKK>$Di002M$000"
        "0000000P(?uy1pxpA002Ni1ONp900000KmY&$5C8xG002M*0R#j95I_I`0YLx&0000$5C8xG01yBG01yBG1Oz|;KtKQh0003101!X{0000000000"
        "00000KmY(hK>z>&5D)+X08jt`0000000000000mG1ONa40RRC&000000000000aOK0RR9101yBG00000000005C8xG000010000000aO40000000"
        "aO401yxW002N01pyTV08jt`P!$0H1P}xO0000100aO406+l%K@?N~5CA{`KmY&)0000100000KmY&)000000RR9H1ONm8009&L00aa8000000000"
        "0000C4000mK1P}!Q00aO5009610RRvH00031000000000406+i$L;wH)K@b1{0000001yBG000yK000000RR910000000004000001ONa4009610"
        "00005C8xG5C8xG07U@=1ONa4000310000$5C8xGKokK05C8xG0RRL5002M$0000$0000000000000000000006+i$1OPw)MF0Q*002M`1ONa4000"
        "050000000jU5000310R"
    ),
    "IQ2_S": (
        "RaI3{RYg@51rb$MQBXxy6a^I&R8bI6RRjPL5fD&SMO9T*6;wr0P*qhFRaF#JQ4l~?1OQPK1W*tFKowOHRaH?C0Rcb-RRly)5I{fx009&b1rPuL06"
        "+j#RZ&qzRTULc6jW7JMO76ARTKbF6hT1*1ppKT08m9$6jfCeR8bH>RTTwQ6a-KZ06-K40TcuP5C8x`RZ#>~Q4l}@0031K1W*tF5C8xK5Ci}a00aO"
        "4002}`6;VM21OX8MR8T=c1qA^V1ON~a08s=1000F5L{$_8RTKnJ5CA|F1pyQU01*HH00jX61ONm80000H6aY{V002M$02KrP0000001yBG1V8`)0"
        "0ck*08mv`MO9T56hu)_MO6h=RTNZF5I{i{1W^<OPyhfxRaI3~RZ&nyK>$@%6jV_VP(c6yRTKnJ5CA{`01y;aQBXxe00aR5R8bH>K>z>&Kmbq>06+"
        "i$00000P(@W0RaF#JQ2;<y6$Mok1W*tFKokW56a)Yi00010RTNZF5I{iy096zOP!Iq>0000K1OO2L0000008~*BKtVtN0RR9{5CA{`0000001yBW"
        "00000KmY(lMHK~66a+vJ06-N50TcuP5C9MW1OWg90096100B`H1W*tFKmY&$6a)Ye5C9MW1ONm800000000mGP!IqB000mG009sH06+i$0000000"
        "0001ONa406;($MG+KK5fDKE07X?4R8asxK>$Dz6#!5W0000008~{GP(?ui1pxq5Q4l~u0003208kJBPyhe`0000GK>+{-0RR91KtKTi0096%0000"
        "0000C400lq*00Bi+5L8hRKtTWi5flJW5D)+W000yO01yBG0000$R8bH>K>z>&Kmbq>06+i$0000H5C8xG5C9MW002Ni01yEH00000Pyhe`01*HH0"
        "000000000002M$01*)oR1g3F000C5000mG00aO401yN~6aWAKL;(O%5CA{`00001Ko9^B0000000000000001ONa4002M$KmY&$0000100000KmY"
        "&)002M%6afGL01yBG0R"
    ),
    "IQ1_S": (
        "RV5UKpaMcs2t_fdh9HWf8VD*N6opU}f*?diB^3pr0)ilj7yt-@paUwPh`Xu^kg5v+A^-}ijDnyDKv4)qA&7ub6hcu5iZBS6pa_5}2t^?jg&;^mRR"
        "~1^EW)55iY5RmB&e#Q2;#2@2q-83paMcDswg0+fFKH+2)VkbAj+<ZqOPhseCz7EyMhk5BD%`c4w3>Q03sl$in<Dd0tf&qO5mb9A|NZG0D(Y(s){H"
        "GA^{YIP!)n82}L1Pg`fxmBd9tcgn}ScLQx2!APALE6ap#;xTu1FphyBB2!f($q5>$ZDhP!j2!b#OML+;WAryt6076j!MFA;-0E&Vt2%#_(1yB@%C"
        "<sL%6onuH0wAg?03Z^vimoWAx}mD5Z~%e|2m&Y~0)zm907!tK>aZ%R!XS&fBI??wi;HfklCUbOa*K*Y3@RW<gg_{YDhR3|$jqW5qOY2u=%@k!0st"
        "zghyWmfpo^lSD7v74f-(xazPP&n>!P45q6mr#DC(jBp)vvt`lRaK?<=S-jlO>C`uBgo=6$-}Y5OPtzb5(;>EVhZ5URcogsKR#s0)Iw|GFgUgMb8L"
        "ENJqm3ZyFl0xAdy;;Iq=0)i?ErXb0JiI9RQ0HOelfD-_M2nYadimIx+0;ax-pvnS(YnLw2vgr_l5H70TC>7DA1ON(x0E&Vj2mzrWf~q;XA~J-a34"
        "j;?ilSlyffPhh07W6Jf>0DfQ3$FaD5{4F5-JEqAru9m2trW^MFAiJpg^J`0Ehqxq6lh=Zn&zdfB+y0g5t;`AqYfJ6hcu6iXat*P!xs=2&yV7fB*_"
        "YQ3ypLr~ptDLQx3fAc%qr7=kJYs-miju!{l;DykqTf`F<DC<rJ3sfYq1puP(zxCn~6OR}#2x}^B7svuG*Xttm*=70(UC<r2IVt^nD0;;Mjs_LStp"
        "rQx}5Fnt6A^?I807W4bg`f&RQ3ypLsRjT_ssae501ypC6oM!SMIjUg00@GDtnwfL0062AC<?kD>Y@Swf=CG{=@bAFOGQxtMFFS+P!vK@2#6#Ih$s"
        "p`2mnO^6a}CHKv4)q0R"
    ),
    "IQ3_XXS": (
        "6^aD{1ONai3I!qs0uTTJ6#@l{0D=G@f(0M|0000100;np5P$$Ef&c&n00aO40000W000mG08sz{2mk^A3Iz%kfB^si1p);C000003IzfI000041p"
        "om8Kmb4hA^-pY00961000pHKmY&&AOHXW00000000C40RR911qww11ONa4Dg^=o004*q1%d^D0U!VX0ucZJ0000H0000W00;m82mpWp0ssII0000"
        "0000003P1n=AOHXW0tE^H00AHb1pom8Pyhe`3IQMh00aO800ICA0000000001fB*mlK>!2*03ZMW01yB`000O800008000315P$%n0Ehqp000000"
        "000G0004i0RTY&fB*mhAOHXW5C8xG00IyI001BW2mk;90000000000AO!#c0000000aO40ssI3K>$Di03ZMW01yBK000041ONa400;m800D>q000"
        "041ONa6000000000000961000mG1ONa4000mGPyi4B00062000620Du4h000mG0000%00000000005C8xGAOHXW00aO400008000002mk^A00000"
        "r~v>300aO4002M$0RR9100aO4AOrva0U!Vf00031000620ssI21pp8L0000000001000000000000000"
    ),
    "IQ3_S": (
        "r&l8gr3wX-7bA%x5C9?sqe&tWqzV8D2qFba5CwoD0f-U=2?78C6aYmCq5wb$Knef?00aO66#zvD01*HH7pnzQ08j!1OA!JI0tEm;0i+QG2_OLkk_"
        "mzl0ssU7C=>t+L=gZ00to^I00IC2005ByPyhe`3Izfn0ssU7t5u2xDg}Tk1&JgQ1Ofm6k^l;U0*C+-B?1%*1OY$*f&d950ssIc5CQ~%0SEvAg#ZE"
        "o03ZSYAOb)E2mt^91gZoolmZ9>Di8_)0RRC+0R#aQ009610uhP<iXZ?82tot`00a>L0tFxh5I_J306+i$0ssI23IGKl000005d@J00s#O4gbD;92"
        "qFLg3Lydr0e}Pn5DEn%000001pp9$0RR93pa22@000C400;mO0003103iSY2m$~A1Q7%Pkpw^xDg*)q000040Rjj?00;m8gaLp65CR|w5&!`NKmY"
        "&$00ck)015yA000001ONa46aWMO0000004e|q000310RVvj000mG00aOK1Rw+f0T2QJ0RR91001BW2mk~C2><{P00031AOHXW0RR91015yA00000"
        "kpKli0T2WL1OgBMC;$Ke5<vn100IC21ONae00;m8A_xHh00961000C41ONa41ONa6000000RR9100000"
    ),
}
_ODD = tuple(range(1, 16, 2))
_VALUES: dict[str, tuple[int, ...]] = {
    "IQ2_XXS": (8, 25, 43),
    "IQ2_XS": (8, 25, 43),
    "IQ2_S": (8, 25, 43),
    "IQ1_S": (-1, 0, 1),
    "IQ3_XXS": (4, 12, 20, 28, 36, 44, 52, 62),
    "IQ3_S": _ODD,
}
# The signs of eight values by an index of seven bits: the eighth makes the number of negative ones even.
_SIGNS = np.array([index | index.bit_count() % 2 << 7 for index in range(128)], np.uint8)
_F = np.float32


@cache
def _codebook(name: str) -> Floats:
    """The values of every entry: [entries, 8 or 4]."""
    values = np.array(_VALUES[name], np.float32)
    bits = np.frombuffer(base64.b85decode("".join(_POINTS[name])), np.uint8)
    points = np.flatnonzero(np.unpackbits(bits, bitorder="little"))
    digits = 8 if len(values) == 3 else 4
    entries: Floats = values[points[:, None] // len(values) ** np.arange(digits) % len(values)]
    return entries


def _half(blocks: Bytes, at: int) -> Floats:
    """[n, bytes] -> [n, 1]: the binary16 number at byte `at`."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _words(blocks: Bytes, start: int, end: int, kind: str) -> NDArray[Any]:
    """Bytes `start` to `end` as numbers: [n, count]."""
    return np.ascontiguousarray(blocks[:, start:end]).view(kind)


def _fields(numbers: NDArray[Any], shifts: tuple[int, ...], mask: int) -> NDArray[np.int32]:
    """[n, count] -> [n, count, len(shifts)]: what each number has at each of the shifts."""
    fields: NDArray[np.int32] = (numbers.astype(np.int64)[..., None] >> np.array(shifts) & mask).astype(np.int32)
    return fields


def _nibbles(blocks: Bytes, start: int, end: int) -> NDArray[np.int32]:
    """[n, 2 * bytes]: the low halves of the bytes before the high ones of the same byte."""
    return _fields(blocks[:, start:end], (0, 4), 15).reshape(len(blocks), -1)


def _two_bits(blocks: Bytes, start: int) -> NDArray[np.int32]:
    """[n, 256] codes of 2 x 32 bytes: each pair of bits of 32 bytes, then the next pair, then the other 32 bytes."""
    codes = _fields(blocks[:, start : start + 64].reshape(-1, 32), (0, 2, 4, 6), 3)
    return codes.swapaxes(1, 2).reshape(len(blocks), 256)


def _times(scales: Floats, values: NDArray[Any]) -> Floats:
    """[n, s] times [n, 256], 256 / s columns for each scale."""
    grouped = values.reshape(*scales.shape, -1).astype(np.float32)
    product: Floats = (scales[..., None] * grouped).reshape(len(scales), 256)
    return product


def _signed(bits: NDArray[Any]) -> Floats:
    """[n, 32] bytes of signs as [n, 256] factors."""
    negative = _fields(bits, tuple(range(8)), 1).reshape(len(bits), 256)
    return np.where(negative, _F(-1), _F(1))


def _q2_k(blocks: Bytes) -> Floats:
    scales = blocks[:, :16]
    dl = _half(blocks, 80) * (scales & 15).astype(np.float32)
    ml = _half(blocks, 82) * (scales >> 4).astype(np.float32)
    return _times(dl, _two_bits(blocks, 16)) - np.repeat(ml, 16, axis=1)


def _q3_k(blocks: Bytes) -> Floats:
    low = np.concatenate([blocks[:, 96:104] & 15, blocks[:, 96:104] >> 4], axis=1).astype(np.int32)
    high = _fields(blocks[:, 104:108], (0, 2, 4, 6), 3).swapaxes(1, 2).reshape(len(blocks), 16)
    scales = (low | high << 4) - 32
    above = _fields(blocks[:, :32], tuple(range(8)), 1).swapaxes(1, 2).reshape(len(blocks), 256)
    return _times(_half(blocks, 108) * scales.astype(np.float32), _two_bits(blocks, 32) - 4 * (1 - above))


def _ternary(dl: Floats, index: NDArray[np.int32], down: NDArray[Any]) -> Floats:
    """Points of -1, 0 and 1, [n, 32] of them, moved by an eighth."""
    delta = np.where(down, _F(-0.125), _F(0.125))
    return _times(dl, _codebook("IQ1_S")[index] + delta[..., None])


def _iq1_s(blocks: Bytes) -> Floats:
    high = _words(blocks, 34, 50, "<u2")
    dl = _half(blocks, 0) * (2 * (high >> 12 & 7) + 1).astype(np.float32)
    index = blocks[:, 2:34] | _fields(high, (0, 3, 6, 9), 7).reshape(-1, 32) << 8
    return _ternary(dl, index, np.repeat(high >> 15, 4, axis=1))


def _iq1_m(blocks: Bytes) -> Floats:
    words = _words(blocks, 48, 56, "<u2").astype(np.int32)
    pieces = (words >> 12) << np.array([0, 4, 8, 12])
    d = pieces.sum(axis=1).astype(np.uint16).view(np.float16).astype(np.float32)[:, None]
    dl = d * (2 * _fields(words, (0, 3, 6, 9), 7).reshape(-1, 16) + 1).astype(np.float32)
    high = _nibbles(blocks, 32, 48)
    return _ternary(dl, blocks[:, :32] | (high & 7) << 8, high >> 3)


def _iq2_xxs(blocks: Bytes) -> Floats:
    words = _words(blocks, 2, 66, "<u4").reshape(len(blocks), 8, 2)
    rest = words[..., 1]
    db = _half(blocks, 0) * (_F(0.5) + (rest >> 28).astype(np.float32)) * _F(0.25)
    index = _fields(words[..., 0], (0, 8, 16, 24), 255)
    signs = _SIGNS[_fields(rest, (0, 7, 14, 21), 127)].reshape(-1, 32)
    return _times(db, _codebook("IQ2_XXS")[index]) * _signed(signs)


def _iq2_xs(blocks: Bytes) -> Floats:
    codes = _words(blocks, 2, 66, "<u2")
    db = _half(blocks, 0) * (_F(0.5) + _nibbles(blocks, 66, 74).astype(np.float32)) * _F(0.25)
    return _times(db, _codebook("IQ2_XS")[codes & 511]) * _signed(_SIGNS[codes >> 9])


def _iq2_s(blocks: Bytes) -> Floats:
    db = _half(blocks, 0) * (_F(0.5) + _nibbles(blocks, 74, 82).astype(np.float32)) * _F(0.25)
    index = blocks[:, 2:34] | _fields(blocks[:, 66:74], (0, 2, 4, 6), 3).reshape(-1, 32) << 8
    return _times(db, _codebook("IQ2_S")[index]) * _signed(blocks[:, 34:66])


def _iq3_xxs(blocks: Bytes) -> Floats:
    rest = _words(blocks, 66, 98, "<u4")
    db = _half(blocks, 0) * (_F(0.5) + (rest >> 28).astype(np.float32)) * _F(0.5)
    signs = _SIGNS[_fields(rest, (0, 7, 14, 21), 127)].reshape(-1, 32)
    return _times(db, _codebook("IQ3_XXS")[blocks[:, 2:66]]) * _signed(signs)


def _iq3_s(blocks: Bytes) -> Floats:
    db = _half(blocks, 0) * (1 + 2 * _nibbles(blocks, 106, 110)).astype(np.float32)
    index = blocks[:, 2:66] | _fields(blocks[:, 66:74], tuple(range(8)), 1).reshape(-1, 64) << 8
    return _times(db, _codebook("IQ3_S")[index]) * _signed(blocks[:, 74:106])


def _tq1_0(blocks: Bytes) -> Floats:
    """Five values of -1, 0 and 1 to a byte, as the digits of a fraction in base 3."""

    def digits(start: int, end: int, count: int) -> NDArray[np.int32]:
        fractions = blocks[:, None, start:end].astype(np.int32) * 3 ** np.arange(count)[:, None] & 255
        found: NDArray[np.int32] = (fractions * 3 >> 8).reshape(len(blocks), -1)
        return found

    return _times(_half(blocks, 52), np.concatenate([digits(0, 32, 5), digits(32, 48, 5), digits(48, 52, 4)], 1) - 1)


def _tq2_0(blocks: Bytes) -> Floats:
    return _times(_half(blocks, 64), _two_bits(blocks, 0) - 1)


_DEQUANTIZE: dict[str, Callable[[Bytes], Floats]] = {
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "IQ1_S": _iq1_s,
    "IQ1_M": _iq1_m,
    "IQ2_XXS": _iq2_xxs,
    "IQ2_XS": _iq2_xs,
    "IQ2_S": _iq2_s,
    "IQ3_XXS": _iq3_xxs,
    "IQ3_S": _iq3_s,
    "TQ1_0": _tq1_0,
    "TQ2_0": _tq2_0,
}


@np.errstate(all="ignore")
def dequantize(type: str, tiles: Bytes) -> Floats:
    """Tiles [..., bytes] of 16 raw blocks, one of each row, as [..., 16, 256]. Raises KeyError for another type."""
    blocks = np.ascontiguousarray(tiles).reshape(-1, tiles.shape[-1] // 16)
    return _DEQUANTIZE[type](blocks).reshape(*tiles.shape[:-1], 16, 256)
